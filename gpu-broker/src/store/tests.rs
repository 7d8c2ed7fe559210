//! What the store keeps, shares and refuses.

use super::*;

fn file(path: &str, len: u64) -> ModelFile {
    ModelFile { path: path.to_owned(), len: Bytes::new(len) }
}

fn digest_of(bytes: &[u8]) -> ModelDigest {
    use sha2::Digest;
    ModelDigest(sha2::Sha256::digest(bytes).into())
}

fn add(store: &Store, bytes: &[u8]) -> Result<(), UploadError> {
    let mut upload = Upload::begin(store, digest_of(bytes), vec![file("m.onnx", bytes.len() as u64)])?;
    assert!(upload.take(bytes)?);
    upload.finish()
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for bad in ["../x", "/etc/passwd", "a/b", "", ".", "..", "model.json", "a\0b"] {
        assert!(check_files(&[file(bad, 1)], Bytes::mib(1)).is_err(), "{bad:?}");
    }
    assert!(check_files(&[file("a", 1), file("a", 1)], Bytes::mib(1)).is_err(), "twice");
    assert!(check_files(&[file("a", u64::MAX), file("b", 2)], Bytes::new(u64::MAX)).is_err(), "overflow");
    assert!(check_files(&[file("a", 2 << 20)], Bytes::mib(1)).is_err(), "too large");
    assert_eq!(check_files(&[file("m.onnx", 5), file("m.data", 6)], Bytes::mib(1)), Ok(()));
}

#[test]
fn what_was_uploaded_in_pieces_is_found_under_its_digest() {
    let dir = tempfile::tempdir().expect("folder");
    let store = Store::open(dir.path(), Bytes::mib(1)).expect("store");
    let files = vec![file("m.onnx", 3), file("empty", 0), file("m.data", 4)];
    let parts = [&b"abc"[..], b"", b"defg"];
    let hashed: Vec<_> = files.iter().cloned().zip(parts.map(|part| digest_of(part).0)).collect();
    let model = ModelDigest::of_files(&hashed);
    let mut upload = Upload::begin(&store, model, files.clone()).expect("draft");
    assert!(!upload.take(b"abcd").expect("taken"));
    assert!(upload.take(b"efg").expect("taken"));
    upload.finish().expect("kept");
    assert_eq!(store.contents(&model), Some(Contents { files }));
    assert_eq!(fs::read(store.model_dir(&model).join("m.data")).expect("file"), b"defg");
}

#[test]
fn an_upload_that_is_something_else_leaves_nothing() {
    let dir = tempfile::tempdir().expect("folder");
    let store = Store::open(dir.path(), Bytes::mib(1)).expect("store");
    let mut upload = Upload::begin(&store, digest_of(b"xyz"), vec![file("m.onnx", 3)]).expect("draft");
    assert!(upload.take(b"abc").expect("taken"));
    assert!(matches!(upload.finish(), Err(UploadError::Refused(_))));
    assert_eq!(store.contents(&digest_of(b"xyz")), None);
    assert_eq!(fs::read_dir(dir.path().join("drafts")).expect("folder").count(), 0);
}

#[test]
fn a_full_store_drops_what_nobody_uses() {
    let dir = tempfile::tempdir().expect("folder");
    let store = Store::open(dir.path(), Bytes::new(5000)).expect("store");
    add(&store, &[1; 2000]).expect("kept");
    add(&store, &[2; 2000]).expect("kept");
    let first = digest_of(&[1; 2000]).hex();
    store.make_room(Bytes::new(2000), |hex| hex == first).expect("room");
    assert!(store.contents(&digest_of(&[1; 2000])).is_some(), "in use");
    assert!(store.contents(&digest_of(&[2; 2000])).is_none(), "not in use");
    assert!(store.make_room(Bytes::new(4000), |_| true).is_err());
}
