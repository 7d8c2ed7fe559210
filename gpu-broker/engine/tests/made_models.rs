//! Made-up models for what real ones do not show: every kind of tensor, external data, weights over 2 GiB, and refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use common::{Made, build::*, equals_a_plain_session, prepare};
use faaswap_engine::onnx::{
    ModelProto, StringStringEntryProto, TensorProto, element, element_of, tensor_proto::DataLocation,
};
use faaswap_protocol::{
    Bytes,
    DType::{self, F16, F32, I8, I64},
};
use prost::Message;

fn check(model: &ModelProto, inputs: &[Made]) -> Bytes {
    let (_dir, path) = write(model);
    equals_a_plain_session(&path, inputs).weights_bytes
}

#[test]
fn weights_of_eight_bit_integers_agree() {
    let product = node("MatMulInteger", &["x", "w"], &["y"]);
    let y = value("y", element_of(DType::I32), &[-1, 64]);
    let x = value("x", element_of(I8), &[-1, 64]);
    let weights = check(
        &model(graph(vec![product], vec![x], vec![y], vec![weight("w", I8, &[64, 64], 1)])),
        &[Made::new(I8, &[3, 64], 2)],
    );
    assert_eq!(weights, Bytes::new(64 * 64));
}

#[test]
fn tables_of_half_floats_found_by_positions_agree() {
    let lookup = node("Gather", &["table", "positions"], &["y"]);
    let positions = value("positions", element_of(I64), &[-1]);
    let y = value("y", element_of(F16), &[-1, 32]);
    let table = weight("table", F16, &[64, 32], 3);
    let inputs = [Made::new(I64, &[5], 4)];
    assert_eq!(check(&model(graph(vec![lookup], vec![positions], vec![y], vec![table])), &inputs), Bytes::kib(4));
}

#[test]
fn weights_of_sixty_four_bit_integers_agree() {
    let sum = node("Add", &["x", "w"], &["y"]);
    let (x, y) = (value("x", element_of(I64), &[-1, 256]), value("y", element_of(I64), &[-1, 256]));
    let weights = vec![weight("w", I64, &[4, 256], 5)];
    let inputs = [Made::new(I64, &[4, 256], 6)];
    assert_eq!(check(&model(graph(vec![sum], vec![x], vec![y], weights)), &inputs), Bytes::kib(8));
}

/// A tensor whose data lies in another file.
fn external(name: &str, dims: &[i64], file: &str) -> TensorProto {
    let entry = StringStringEntryProto { key: Some("location".to_owned()), value: Some(file.to_owned()) };
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.to_vec(),
        data_type: Some(element_of(F32)),
        data_location: Some(DataLocation::External.into()),
        external_data: vec![entry],
        ..Default::default()
    }
}

/// `y = table[positions]` with a table in a file beside the graph.
fn lookup(rows: i64, columns: i64) -> ModelProto {
    let positions = value("positions", element_of(I64), &[-1]);
    let y = f32_value("y", &[-1, columns]);
    let table = external("table", &[rows, columns], "table.bin");
    model(graph(vec![node("Gather", &["table", "positions"], &["y"])], vec![positions], vec![y], vec![table]))
}

fn write_row(file: &File, row: u64, columns: u64, first: f32) {
    let values: Vec<u8> =
        (0..columns).flat_map(|i| (first + f32::from(u16::try_from(i).unwrap())).to_le_bytes()).collect();
    file.write_all_at(&values, row * columns * 4).unwrap();
}

fn positions(rows: &[i64]) -> Made {
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
    Made::from_bytes(I64, &[rows.len() as u64], &bytes)
}

#[test]
fn external_data_beside_the_graph_agrees() {
    let (dir, path) = write(&lookup(16, 128));
    let file = File::create(dir.path().join("table.bin")).unwrap();
    (0..16_u16).for_each(|row| write_row(&file, row.into(), 128, f32::from(row) * 1000.0));
    let manifest = equals_a_plain_session(&path, &[positions(&[0, 15, 7])]);
    assert_eq!(manifest.weights_bytes, Bytes::kib(8));
}

#[test]
#[ignore = "needs 8 GB of memory and two minutes: make test-large"]
fn weights_over_two_gigabytes_agree() {
    // 2.25 GiB, most of it a hole in the file: rows at both ends hold something.
    let (rows, columns) = (9 << 16, 1024);
    let (dir, path) = write(&lookup(rows, columns));
    let file = File::create(dir.path().join("table.bin")).unwrap();
    let size = u64::try_from(rows * columns * 4).unwrap();
    file.set_len(size).unwrap();
    write_row(&file, 0, 1024, 1.0);
    write_row(&file, u64::try_from(rows - 1).unwrap(), 1024, 5000.0);
    let manifest = equals_a_plain_session(&path, &[positions(&[0, rows - 1, 1 << 18])]);
    assert_eq!(manifest.weights_bytes, Bytes::new(size));
}

fn refusal(path: &Path) -> String {
    let out = tempfile::tempdir().unwrap();
    prepare(path, out.path()).expect_err("refused").to_string()
}

#[test]
fn strings_are_refused_by_name() {
    let same = node("Identity", &["words"], &["y"]);
    let (x, y) = (value("words", element::STRING, &[-1]), value("y", element::STRING, &[-1]));
    let (_dir, path) = write(&model(graph(vec![same], vec![x], vec![y], vec![])));
    let refusal = refusal(&path);
    assert!(refusal.contains("words") && refusal.contains("STRING"), "{refusal}");
}

#[test]
fn external_data_through_a_link_out_of_its_folder_is_refused() {
    let (dir, path) = write(&lookup(16, 128));
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret");
    std::fs::write(&secret, vec![1; 16 * 128 * 4]).unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("table.bin")).unwrap();
    assert!(!refusal(&path).is_empty());
}

#[test]
fn external_data_that_is_too_short_is_refused() {
    let (dir, path) = write(&lookup(16, 128));
    std::fs::write(dir.path().join("table.bin"), vec![1; 100]).unwrap();
    assert!(!refusal(&path).is_empty());
}

#[test]
fn a_truncated_graph_is_refused() {
    let (dir, path) = write(&lookup(16, 128));
    let bytes = lookup(16, 128).encode_to_vec();
    std::fs::write(dir.path().join("model.onnx"), &bytes[..bytes.len() - 9]).unwrap();
    assert!(!refusal(&path).is_empty());
}
