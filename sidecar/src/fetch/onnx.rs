//! Tells an ONNX file from what servers send instead: a login page, an error in JSON, a pointer to large storage.
//!
//! By its first byte only, which saves an upload and gives a clear reason. Whether it is a model is the broker's to say.

/// Keys of the fields of `onnx.ModelProto`, one of which every file begins with; of those of two bytes the first.
const KEYS: [u8; 12] = [0x08, 0x12, 0x1a, 0x22, 0x28, 0x32, 0x3a, 0x42, 0x72, 0xa2, 0xca, 0xd2];

/// Whether a file that begins so may be an ONNX model.
pub(super) fn begins(piece: &[u8]) -> bool {
    piece.first().is_some_and(|first| KEYS.contains(first))
}

/// The beginning of a file, fit for a log line.
pub(super) fn shown(piece: &[u8]) -> String {
    const SHOWN: usize = 24;
    piece.iter().take(SHOWN).flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_pointers_are_told_from_models() {
        let pages: [&[u8]; 6] = [
            b"<!DOCTYPE html>",
            b"{\"error\":1}",
            b"version https://git-lfs",
            b"\x1f\x8b\x08",
            b"\n\n<html>",
            b"PK\x03\x04",
        ];
        assert_eq!(pages.map(begins), [false; 6]);
        assert!(begins(b"\x08\x09\x12\x07pytorch") && begins(b"\x3a\x10") && !begins(b""));
        assert_eq!(shown(b"<html>\n\xff"), "<html>\\n\\xff");
    }
}
