//! What went wrong in a test or the demo: one sentence for a person. Nobody decides on it, so it has no variants.

use std::fmt::Display;

/// Why something could not be done.
#[derive(Debug)]
pub struct Trouble(String);

/// A result whose failure is one sentence.
pub type Result<T> = std::result::Result<T, Trouble>;

impl Trouble {
    /// A failure said in these words.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// Says what was being done.
    pub fn while_doing(what: impl Display) -> impl Fn(std::io::Error) -> Self {
        move |error| Self(format!("{what}: {error}"))
    }
}

impl Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Trouble {}

macro_rules! from {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Trouble {
            fn from(error: $error) -> Self {
                Self(error.to_string())
            }
        })*
    };
}

from!(
    std::io::Error,
    serde_json::Error,
    faaswap_engine::EngineError,
    faaswap_protocol::ShapeError,
    prost::DecodeError,
    std::num::ParseIntError,
    std::num::TryFromIntError,
);
