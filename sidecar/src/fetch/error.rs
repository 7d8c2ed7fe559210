//! Why a model could not be fetched, and whether that may pass.

use std::{path::PathBuf, time::Duration};

use faaswap_protocol::{Bytes, ModelDigest};
use http::StatusCode;

use super::url::ModelUrl;

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The connection, or what came over it.
    #[error("{url}: {what}")]
    Broken {
        /// Which file.
        url: ModelUrl,
        /// What happened.
        what: String,
    },
    /// The server declined.
    #[error("{url}: the server answers {status}{}", hint(*.status))]
    Status {
        /// Which file.
        url: ModelUrl,
        /// How.
        status: StatusCode,
    },
    /// A redirect that is not followed.
    #[error("{url}: a redirect {why}")]
    Redirect {
        /// From where.
        url: ModelUrl,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file, or all files together, exceed the limit.
    #[error("{url}: the model is larger than the {max} that it may have; raise model_mib_max")]
    TooLarge {
        /// The file that was too much.
        url: ModelUrl,
        /// For all files.
        max: Bytes,
    },
    /// A compressed reply that was not asked for.
    #[error("{url}: the server sends the file packed (Content-Encoding), which was not asked for")]
    Packed {
        /// Which file.
        url: ModelUrl,
    },
    /// Nobody could tell whether the file came to its end.
    #[error("{url}: the server does not say how long the file is; pin it by #sha256= or model_digest")]
    NoLength {
        /// Which file.
        url: ModelUrl,
    },
    /// Another kind of file.
    #[error("{url}: this is no ONNX file, it begins with '{begins}'")]
    NoOnnx {
        /// Which file.
        url: ModelUrl,
        /// How.
        begins: String,
    },
    /// Other content than was pinned.
    #[error("{url}: the model that came is {came}, {wanted} was wanted")]
    Digest {
        /// The graph.
        url: ModelUrl,
        /// What came.
        came: ModelDigest,
        /// What was wanted.
        wanted: ModelDigest,
    },
    /// The file cannot be written.
    #[error("the model cannot be written below {} (set model_dir to a folder with room): {error}", folder.display())]
    Disk {
        /// Where.
        folder: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file with the credentials.
    #[error("model_auth_file {}: {why}", path.display())]
    Credentials {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An https URL on a system without authorities.
    #[error("no certificate authorities are on this system; set SSL_CERT_FILE to a bundle of them")]
    NoAuthorities,
    /// TLS cannot be set up.
    #[error("TLS cannot be used: {0}")]
    Tls(String),
    /// The time is over.
    #[error("{url}: the model did not come within {within:?}")]
    Slow {
        /// The graph.
        url: ModelUrl,
        /// The limit.
        within: Duration,
    },
}

fn hint(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 | 403 => "; give credentials by model_auth_file or FAASWAP_MODEL_AUTH, or a URL that is still valid",
        404 | 410 => "; there is no such file",
        _ => "",
    }
}

impl FetchError {
    /// Whether a moment later it may be otherwise.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Broken { .. } => true,
            Self::Status { status, .. } => status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429),
            Self::Redirect { .. }
            | Self::TooLarge { .. }
            | Self::Packed { .. }
            | Self::NoLength { .. }
            | Self::NoOnnx { .. }
            | Self::Digest { .. }
            | Self::Disk { .. }
            | Self::Credentials { .. }
            | Self::NoAuthorities
            | Self::Tls(_)
            | Self::Slow { .. } => false,
        }
    }

    /// Whether finding out costs as much as the whole model: such a fetch is not soon tried again.
    pub(super) fn is_dear(&self) -> bool {
        matches!(self, Self::Digest { .. } | Self::TooLarge { .. } | Self::Slow { .. })
    }
}
