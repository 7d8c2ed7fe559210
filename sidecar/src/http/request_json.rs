//! The JSON of an infer request as it is written; what it means is decided in `request`.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct Head<'a> {
    #[serde(borrow, default)]
    pub(super) id: Option<Cow<'a, str>>,
    #[serde(default)]
    pub(super) parameters: Option<HeadParameters>,
    #[serde(borrow, default)]
    pub(super) inputs: Option<Vec<Input<'a>>>,
    #[serde(borrow, default)]
    pub(super) outputs: Option<Vec<Output<'a>>>,
}

/// The parameters of a request that mean something here; others are taken and ignored.
#[derive(Default, Deserialize)]
pub(super) struct HeadParameters {
    #[serde(default)]
    pub(super) binary_data_output: Option<bool>,
    #[serde(default)]
    pub(super) timeout: Option<u64>,
}

#[derive(Deserialize)]
pub(super) struct Input<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) datatype: Cow<'a, str>,
    pub(super) shape: Vec<DimText>,
    #[serde(default)]
    pub(super) parameters: Option<InputParameters>,
    #[serde(borrow, default)]
    pub(super) data: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
pub(super) struct InputParameters {
    #[serde(default)]
    pub(super) binary_data_size: Option<u64>,
    #[serde(default)]
    pub(super) shared_memory_region: Option<de::IgnoredAny>,
}

#[derive(Deserialize)]
pub(super) struct Output<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    #[serde(default)]
    pub(super) parameters: Option<OutputParameters>,
}

#[derive(Default, Deserialize)]
pub(super) struct OutputParameters {
    #[serde(default)]
    pub(super) binary_data: Option<bool>,
    #[serde(default)]
    pub(super) classification: Option<de::IgnoredAny>,
    #[serde(default)]
    pub(super) shared_memory_region: Option<de::IgnoredAny>,
}

/// A dimension, with an error that says what one is.
pub(super) struct DimText(pub(super) i64);

impl<'de> Deserialize<'de> for DimText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = DimText;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a dimension: a whole number from 0 to 9223372036854775807")
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<DimText, E> {
                Ok(DimText(n))
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<DimText, E> {
                i64::try_from(n).map(DimText).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(n), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
