//! Addresses of model files: what is one, where a redirect leads, and how one is shown.
//!
//! Never shown: the query, which may hold a signature. User names and passwords are not taken in a URL at all.

use std::{fmt, sync::Arc};

use faaswap_protocol::ModelDigest;
use http::Uri;

/// `http://` or `https://`, host, path and query.
#[derive(Clone, PartialEq, Eq)]
pub struct ModelUrl(Arc<Uri>);

impl ModelUrl {
    /// Whether a text wants to be one, rather than a path.
    pub fn is_meant(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| scheme.bytes().all(|b| b.is_ascii_alphanumeric()))
    }

    /// Reads a URL, and the digest behind `#sha256=`. The text is not repeated in errors: it may hold a secret.
    pub fn parse(text: &str) -> Result<(Self, Option<ModelDigest>), String> {
        let (address, fragment) = text.split_once('#').map_or((text, None), |(address, rest)| (address, Some(rest)));
        let digest = match fragment.map(|fragment| fragment.strip_prefix("sha256=")) {
            None => None,
            Some(Some(hex)) => Some(format!("sha256:{hex}").parse().map_err(|_| NO_DIGEST.to_owned())?),
            Some(None) => return Err(NO_DIGEST.to_owned()),
        };
        let uri: Uri = address.parse().map_err(|error| format!("this is no URL: {error}"))?;
        match uri.scheme_str() {
            Some("http" | "https") => {}
            Some("s3" | "gs" | "oci") => return Err(OTHER_STORES.to_owned()),
            Some(_) | None => return Err("a URL begins with https:// or http://".to_owned()),
        }
        match uri.authority() {
            Some(authority) if authority.as_str().contains('@') => Err(IN_THE_URL.to_owned()),
            Some(authority) if !authority.host().is_empty() => Ok((Self(Arc::new(uri)), digest)),
            Some(_) | None => Err("the URL names no host".to_owned()),
        }
    }

    /// The URL that a reference beside this one means: a redirect's target, or another file of the model.
    pub fn join(&self, reference: &str) -> Result<Self, String> {
        let scheme = self.0.scheme_str().unwrap_or_default();
        let host = self.0.authority().map_or("", |authority| authority.as_str());
        let reference = reference.split_once('#').map_or(reference, |(address, _)| address);
        let whole = if Self::is_meant(reference) {
            reference.to_owned()
        } else if let Some(rest) = reference.strip_prefix("//") {
            format!("{scheme}://{rest}")
        } else if reference.starts_with('/') {
            format!("{scheme}://{host}{reference}")
        } else {
            let folder = self.0.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{scheme}://{host}{folder}/{reference}")
        };
        Self::parse(&whole).map(|(url, _)| url)
    }

    /// What the file is called: the end of the path.
    pub fn name(&self) -> Option<&str> {
        self.0.path().rsplit('/').next().filter(|name| !name.is_empty() && *name != "." && *name != "..")
    }

    /// Whether what comes from there cannot be read or changed on its way.
    pub fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    /// Whether both lead to the same server: only that is told credentials.
    pub(super) fn has_origin_of(&self, other: &Self) -> bool {
        let origin = |uri: &Uri| (uri.scheme().cloned(), uri.authority().cloned());
        origin(&self.0) == origin(&other.0)
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.0
    }
}

const NO_DIGEST: &str = "behind the # of the URL stands sha256=<64 hexadecimal digits>, or nothing";
const IN_THE_URL: &str = "the URL has credentials in it; give them by model_auth_file or FAASWAP_MODEL_AUTH";
const OTHER_STORES: &str = "only https:// and http:// are fetched; a store such as S3 gives presigned https URLs";

impl fmt::Display for ModelUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.authority().map_or("", |authority| authority.as_str());
        write!(f, "{}://{host}{}", self.0.scheme_str().unwrap_or_default(), self.0.path())
    }
}

impl fmt::Debug for ModelUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn url(text: &str) -> ModelUrl {
        ModelUrl::parse(text).unwrap().0
    }

    #[test]
    fn a_url_is_shown_without_what_may_be_secret() {
        let signed = url("https://h:8443/a/m.onnx?X-Signature=s3cret");
        assert_eq!((signed.to_string(), format!("{signed:?}")), {
            let shown = "https://h:8443/a/m.onnx".to_owned();
            (shown.clone(), shown)
        });
        let refused = ModelUrl::parse("https://me:s3cret@h/m.onnx").unwrap_err();
        assert!(refused.contains("model_auth_file") && !refused.contains("s3cret"), "{refused}");
    }

    #[test]
    fn a_digest_may_stand_behind_the_hash() {
        let hex = "ab".repeat(32);
        let (_, digest) = ModelUrl::parse(&format!("https://h/m.onnx#sha256={hex}")).unwrap();
        assert_eq!(digest.unwrap().hex(), hex);
        for bad in ["https://h/m#sha256=12", "https://h/m#top", "https://h/m#"] {
            assert!(ModelUrl::parse(bad).unwrap_err().contains("64 hexadecimal"), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_fetched_is_refused_with_what_can() {
        for (bad, said) in [
            ("ftp://h/m", "begins with https://"),
            ("s3://bucket/m", "presigned"),
            ("https:///m", "no"),
            ("https://h h/m", "no URL"),
        ] {
            let refused = ModelUrl::parse(bad).unwrap_err();
            assert!(refused.contains(said), "{bad}: {refused}");
        }
    }

    #[test]
    fn references_are_resolved_beside_the_url() {
        let graph = url("https://h/models/v1/m.onnx?sig=1");
        for (reference, whole) in [
            ("w.bin", "https://h/models/v1/w.bin"),
            ("/w.bin", "https://h/w.bin"),
            ("//cdn/w.bin", "https://cdn/w.bin"),
            ("http://other/w.bin?x", "http://other/w.bin"),
        ] {
            assert_eq!(graph.join(reference).unwrap().to_string(), whole);
        }
        assert_eq!(graph.name(), Some("m.onnx"));
        assert_eq!(url("https://h/models/").name(), None);
        assert!(!graph.has_origin_of(&graph.join("//cdn/w.bin").unwrap()));
    }
}
