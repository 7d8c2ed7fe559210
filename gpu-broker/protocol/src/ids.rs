//! Names and numbers of the things that messages speak about.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{limits::NAME_BYTES_MAX, message::ModelFile};

/// A request on one connection, chosen by the sidecar; free again after its answer or refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// A registration or an upload on one connection, chosen by the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CallId(pub u32);

/// A registered function on one connection, chosen by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FunctionId(pub u32);

/// Why a text is no name or digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A function name is 1 to 256 of `a-z A-Z 0-9 . _ / -` and starts with a letter or digit.
    #[error("a function name is 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 . _ / - and starts with a letter or digit")]
    Function,
    /// A digest is `sha256:` and 64 hexadecimal digits.
    #[error("a model digest is `sha256:` and 64 hexadecimal digits")]
    Digest,
}

/// What people call a function: unique per user id on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FunctionName(String);

impl FunctionName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FunctionName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'/' | b'-');
        let starts_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if starts_well && name.len() <= NAME_BYTES_MAX && name.as_bytes().iter().all(inner) {
            Ok(Self(name))
        } else {
            Err(NameError::Function)
        }
    }
}

impl FromStr for FunctionName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::try_from(name.to_owned())
    }
}

impl From<FunctionName> for String {
    fn from(name: FunctionName) -> Self {
        name.0
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a model: SHA-256 of its content.
///
/// A model of one file has the digest of that file (`sha256sum model.onnx`). A model of several files has the digest
/// of its list of files, see [`ModelDigest::of_files`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelDigest(pub [u8; 32]);

impl ModelDigest {
    /// The digest of a model whose files have these digests: `files[0]` is the graph, the others its external data.
    ///
    /// One file: the digest of that file. Several: SHA-256 over one line `<hex digest>  <path>\n` per file, graph
    /// first, then the others sorted by path.
    pub fn of_files(files: &[(ModelFile, [u8; 32])]) -> Self {
        match files {
            [(_, only)] => Self(*only),
            [] => Self(Sha256::digest([]).into()),
            [graph, rest @ ..] => {
                let mut rest: Vec<_> = rest.iter().collect();
                rest.sort_by(|a, b| a.0.path.cmp(&b.0.path));
                let mut hash = Sha256::new();
                for (file, digest) in std::iter::once(graph).chain(rest) {
                    hash.update(format!("{}  {}\n", Self(*digest).hex(), file.path));
                }
                Self(hash.finalize().into())
            }
        }
    }

    /// The 64 hexadecimal digits, without `sha256:`; fit for a file name.
    pub fn hex(&self) -> String {
        use fmt::Write;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _infallible = write!(hex, "{byte:02x}");
            hex
        })
    }
}

impl FromStr for ModelDigest {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let hex = text.strip_prefix("sha256:").ok_or(NameError::Digest)?;
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NameError::Digest);
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| NameError::Digest)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NameError::Digest)?;
        }
        Ok(Self(digest))
    }
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex()[..12])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_leave_its_folder_or_its_metric_label_is_refused() {
        for bad in ["", "-x", ".x", "a b", "a\"b", "a\n", "é", &"x".repeat(257)] {
            assert_eq!(bad.parse::<FunctionName>(), Err(NameError::Function), "{bad:?}");
        }
        assert_eq!("team/resnet-50.v2".parse::<FunctionName>().map(String::from), Ok("team/resnet-50.v2".to_owned()));
    }

    #[test]
    fn a_digest_reads_back_what_it_shows() {
        let digest = ModelDigest(Sha256::digest(b"weights").into());
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!("sha256:00".parse::<ModelDigest>(), Err(NameError::Digest));
        assert_eq!(format!("sha256:{}", "+1".repeat(32)).parse::<ModelDigest>(), Err(NameError::Digest));
    }

    #[test]
    fn the_digest_of_several_files_does_not_depend_on_the_order_of_the_data_files() {
        let file = |path: &str, seed: u8| (ModelFile { path: path.to_owned(), len: crate::Bytes::ZERO }, [seed; 32]);
        let (g, a, b) = (file("model.onnx", 1), file("a.bin", 2), file("b.bin", 3));
        let of = |files: [&(ModelFile, [u8; 32]); 3]| ModelDigest::of_files(&files.map(Clone::clone));
        assert_eq!(of([&g, &a, &b]), of([&g, &b, &a]));
        assert_ne!(of([&g, &a, &b]), of([&a, &g, &b]), "the graph is not one of the data files");
        assert_eq!(ModelDigest::of_files(&[g]), ModelDigest([1; 32]));
    }
}
