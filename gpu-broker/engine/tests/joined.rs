//! Products with the same input, apart and joined: the same answers, of every version of operators.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use std::fs;

use common::{Made, build::*, runtime, with_inputs};
use faaswap_engine::{
    PlainSession, Target,
    onnx::{ModelProto, element_of},
    prepare::{is_close, joined::join},
};
use faaswap_protocol::DType::{self, F32, F64};
use prost::Message;

const ROWS: u64 = 5;
const INNER: u64 = 24;
const COLUMNS: u64 = 16;

/// Three products, with biases or without, each with something else behind it.
fn projections(dtype: DType, biases: bool, opset: i64) -> ModelProto {
    let (mut nodes, mut weights) = (Vec::new(), Vec::new());
    for (seed, (name, behind)) in (1..).zip([("q", "Tanh"), ("k", "Neg"), ("v", "Abs")]) {
        let [weight_name, bias, product, sum] = ["w", "b", "p", "s"].map(|part| format!("{name}{part}"));
        nodes.push(node("MatMul", &["x", &weight_name], &[&product]));
        weights.push(weight(&weight_name, dtype, &[INNER, COLUMNS], seed));
        if biases {
            nodes.push(node("Add", &[&product, &bias], &[&sum]));
            weights.push(weight(&bias, dtype, &[COLUMNS], 10 * seed));
        }
        nodes.push(node(behind, &[if biases { &sum } else { &product }], &[name]));
    }
    nodes.push(node("Sub", &["q", "k"], &["d"]));
    nodes.push(node("Mul", &["d", "v"], &["y"]));
    let of = |name, columns: u64| value(name, element_of(dtype), &[1, ROWS.cast_signed(), columns.cast_signed()]);
    let mut model = model(graph(nodes, vec![of("x", INNER)], vec![of("y", COLUMNS)], weights));
    model.opset_import[0].version = Some(opset);
    model
}

fn answer(dir: &std::path::Path, name: &str, model: &ModelProto, dtype: DType) -> Vec<u8> {
    let path = dir.join(name);
    fs::write(&path, model.encode_to_vec()).unwrap();
    let plain = PlainSession::open(&runtime(), &path, false).unwrap();
    let inputs = [Made::new(dtype, &[1, ROWS, INNER], 7)];
    with_inputs(&inputs, |inputs| plain.run(inputs)).unwrap().remove(0).1
}

#[test]
fn joined_products_give_what_they_gave_apart() {
    for (dtype, biases, opset) in [(F32, true, 17), (F32, false, 17), (F64, true, 17), (F32, true, 18), (F32, true, 11)]
    {
        let dir = tempfile::tempdir().unwrap();
        let original = projections(dtype, biases, opset);
        let mut joined = original.clone();
        assert_eq!(join(joined.graph.as_mut().unwrap(), opset, dir.path()).unwrap(), 1);
        let products = joined.graph.iter().flat_map(|graph| &graph.node).filter(|node| node.op_type() == "MatMul");
        assert_eq!(products.count(), 1);
        let [expected, answered] = [("apart.onnx", &original), ("joined.onnx", &joined)]
            .map(|(name, model)| answer(dir.path(), name, model, dtype));
        assert!(expected.iter().any(|&byte| byte != 0));
        assert!(is_close(Target::Cpu, dtype, &answered, &expected), "{dtype} {biases} {opset}");
    }
}
