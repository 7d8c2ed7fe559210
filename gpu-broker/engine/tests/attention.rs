//! Attention as exporters write it, before and after it is fused: the same answers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use common::{Made, build::*, runtime, with_inputs};
use faaswap_engine::{
    PlainSession,
    onnx::{AttributeProto, ModelProto, NodeProto, TensorProto, attribute_proto::AttributeType},
    prepare::attention::fuse,
};
use faaswap_protocol::DType::{F16, F32, I64};

const ROWS: i64 = 8;
const HEADS: i64 = 4;
const SIZE: i64 = 16;
const WIDTH: i64 = HEADS * SIZE;

fn ints(name: &str, values: &[i64]) -> TensorProto {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(name, &Made::from_bytes(I64, &[values.len() as u64], &bytes))
}

fn transpose(from: &str, to: &str, perm: &[i64]) -> NodeProto {
    let (name, r#type) = (Some("perm".to_owned()), Some(AttributeType::Ints.into()));
    let mut node = node("Transpose", &[from], &[to]);
    node.attribute.push(AttributeProto { name, r#type, ints: perm.to_vec(), ..Default::default() });
    node
}

fn with_float(mut node: NodeProto, name: &str, value: f32) -> NodeProto {
    let (name, r#type) = (Some(name.to_owned()), Some(AttributeType::Float.into()));
    node.attribute.push(AttributeProto { name, r#type, f: Some(value), ..Default::default() });
    node
}

/// One attention over `x`, with what `scores` makes of the transposed queries `qt` and the keys `kt`, transposed so.
fn attention(keys: &[i64], scores: Vec<NodeProto>, mask: &[i64]) -> ModelProto {
    let mut nodes = Vec::new();
    for (name, perm) in [("q", &[0, 2, 1, 3][..]), ("k", keys), ("v", &[0, 2, 1, 3])] {
        let [w, rows, four, heads] = ["w", "rows", "four", "t"].map(|part| format!("{name}{part}"));
        nodes.push(node("MatMul", &["x", &w], &[&rows]));
        nodes.push(node("Reshape", &[&rows, "split"], &[&four]));
        nodes.push(transpose(&four, &heads, perm));
    }
    nodes.extend(scores);
    nodes.push(node("MatMul", &["weights", "vt"], &["mixed"]));
    nodes.push(transpose("mixed", "together", &[0, 2, 1, 3]));
    nodes.push(node("Reshape", &["together", "join"], &["y"]));
    let square = [WIDTH.unsigned_abs(), WIDTH.unsigned_abs()];
    let mut weights: Vec<_> =
        ["qw", "kw", "vw"].iter().zip(1..).map(|(name, seed)| weight(name, F32, &square, seed)).collect();
    weights.extend([ints("split", &[1, ROWS, HEADS, SIZE]), ints("join", &[0, 0, WIDTH])]);
    let inputs = vec![f32_value("x", &[1, ROWS, WIDTH]), f32_value("mask", mask)];
    model(graph(nodes, inputs, vec![f32_value("y", &[1, ROWS, WIDTH])], weights))
}

fn ops(model: &ModelProto) -> Vec<&str> {
    model.graph.iter().flat_map(|graph| &graph.node).map(NodeProto::op_type).collect()
}

fn answer(model: &ModelProto, mask: &[i64]) -> Vec<f32> {
    let mask: Vec<u64> = mask.iter().map(|dim| dim.unsigned_abs()).collect();
    answer_with(model, Made::new(F32, &mask, 8))
}

fn answer_with(model: &ModelProto, mask: Made) -> Vec<f32> {
    let (_dir, path) = write(model);
    let plain = PlainSession::open(&runtime(), &path, false).unwrap();
    let inputs = [Made::new(F32, &[1, ROWS.unsigned_abs(), WIDTH.unsigned_abs()], 7), mask];
    let outputs = with_inputs(&inputs, |inputs| plain.run(inputs)).unwrap();
    outputs[0].1.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// Checks that it is fused, and answers the same.
fn check(original: &ModelProto, mask: &[i64]) -> ModelProto {
    let mut fused = original.clone();
    assert_eq!(fuse(&mut fused, |dtype| dtype == F32), 1);
    assert!(ops(&fused).contains(&"MultiHeadAttention"), "{:?}", ops(&fused));
    assert!(!ops(&fused).iter().any(|op| op.contains("Softmax") || *op == "Transpose"), "{:?}", ops(&fused));
    let (expected, answered) = (answer(original, mask), answer(&fused, mask));
    let worst = expected.iter().zip(&answered).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = expected.iter().copied().map(f32::abs).fold(0.0, f32::max);
    assert_eq!(expected.len(), answered.len());
    assert!(largest > 0.1 && worst < 1e-5 * largest.max(1.0), "{worst} of {largest}");
    fused
}

#[test]
fn attention_with_a_mask_of_keys_is_fused() {
    let mask = [1, 1, 1, ROWS];
    let scores = vec![
        with_float(in_microsofts(node("FusedMatMul", &["qt", "kt"], &["scores"])), "alpha", 0.25),
        node("Add", &["scores", "mask"], &["masked"]),
        node("Softmax", &["masked"], &["weights"]),
    ];
    check(&attention(&[0, 2, 3, 1], scores, &mask), &mask);
}

#[test]
fn attention_with_a_mask_for_each_row_and_keys_that_the_product_transposes_is_fused() {
    let mask = [ROWS, ROWS];
    let product = with_float(in_microsofts(node("FusedMatMul", &["qt", "kt"], &["scores"])), "alpha", 0.25);
    let scores = vec![
        with_int(product, "transB", 1),
        node("Add", &["mask", "scores"], &["masked"]),
        with_int(node("Softmax", &["masked"], &["weights"]), "axis", 3),
    ];
    check(&attention(&[0, 2, 1, 3], scores, &mask), &mask);
}

#[test]
fn attention_without_scale_or_mask_is_fused() {
    let scores = vec![node("MatMul", &["qt", "kt"], &["scores"]), node("Softmax", &["scores"], &["weights"])];
    let mask = [1];
    check(&attention(&[0, 2, 3, 1], scores, &mask), &mask);
}

/// Scores with a mask that is chosen, and zeros where the softmax gives no numbers, as PyTorch's exporter writes it.
fn guarded(hidden: f32) -> ModelProto {
    let scalar = |name: &str, value: f32| tensor(name, &Made::from_bytes(F32, &[], &value.to_le_bytes()));
    let scores = vec![
        node("Greater", &["mask", "zero"], &["is_seen"]),
        node("Where", &["is_seen", "zero", "hidden"], &["bias"]),
        node("MatMul", &["qt", "kt"], &["scores"]),
        node("Add", &["scores", "bias"], &["masked"]),
        node("Softmax", &["masked"], &["unsure"]),
        node("IsNaN", &["unsure"], &["is_none"]),
        node("Where", &["is_none", "zero", "unsure"], &["weights"]),
    ];
    let mut model = attention(&[0, 2, 3, 1], scores, &GUARDED_MASK);
    let graph = model.graph.as_mut().unwrap();
    graph.initializer.extend([scalar("zero", 0.0), scalar("hidden", hidden)]);
    model
}

const GUARDED_MASK: [i64; 4] = [1, 1, ROWS, ROWS];

#[test]
fn zeros_in_the_place_of_no_numbers_are_left_out_where_nothing_infinite_is_added() {
    let fused = check(&guarded(-1e30), &GUARDED_MASK);
    assert!(!ops(&fused).contains(&"IsNaN"));
}

#[test]
fn rows_that_see_no_key_are_zero_where_the_exporter_says_so() {
    for opset in [17, 18] {
        let mut original = guarded(f32::NEG_INFINITY);
        original.opset_import[0].version = Some(opset);
        // A row of zeros hides all keys of its row.
        let mask = |row: i64, column: i64| if row == 2 || column == 5 { 0.0_f32 } else { 1.0 };
        let bytes = (0..ROWS * ROWS).flat_map(|at| mask(at / ROWS, at % ROWS).to_le_bytes()).collect::<Vec<_>>();
        let mask = Made::from_bytes(F32, &GUARDED_MASK.map(i64::unsigned_abs), &bytes);
        let mut fused = original.clone();
        assert_eq!(fuse(&mut fused, |dtype| dtype == F32), 1);
        let (expected, answered) = (answer_with(&original, mask.clone()), answer_with(&fused, mask));
        let width = usize::try_from(WIDTH).unwrap();
        for (row, (expected, answered)) in expected.chunks(width).zip(answered.chunks(width)).enumerate() {
            assert_eq!(expected.iter().all(|&value| value == 0.0), row == 2, "{expected:?}");
            assert!(
                expected.iter().zip(answered).all(|(a, b)| (a - b).abs() < 1e-5),
                "{row}: {expected:?} {answered:?}"
            );
        }
    }
}

#[test]
fn heads_that_the_reshape_counts_itself_are_found_by_the_projection() {
    let scores = vec![node("MatMul", &["qt", "kt"], &["scores"]), node("Softmax", &["scores"], &["weights"])];
    let mut model = attention(&[0, 2, 3, 1], scores, &[1]);
    for tensor in &mut model.graph.as_mut().unwrap().initializer {
        if tensor.name() == "split" {
            *tensor = ints("split", &[1, ROWS, -1, SIZE]);
        }
    }
    check(&model, &[1]);
}

/// Shapes as exporters compute them where numbers of requests and rows are open.
fn open() -> ModelProto {
    let product = with_float(in_microsofts(node("FusedMatMul", &["qt", "kt"], &["scores"])), "alpha", 0.25);
    let scores =
        vec![product, node("Add", &["scores", "mask"], &["masked"]), node("Softmax", &["masked"], &["weights"])];
    let mut model = attention(&[0, 2, 3, 1], scores, &[1, 1, 1, ROWS]);
    let graph = model.graph.as_mut().unwrap();
    graph.initializer.retain(|tensor| !["split", "join"].contains(&tensor.name()));
    graph.initializer.extend([ints("rest", &[-1]), ints("size", &[SIZE])]);
    let dim = |name: &str, at: i64| with_int(with_int(node("Shape", &["x"], &[name]), "start", at), "end", at + 1);
    let concat = |inputs: &[&str], name: &str| with_int(node("Concat", inputs, &[name]), "axis", 0);
    let shapes = [
        dim("batch", 0),
        dim("count", 1),
        concat(&["batch", "count", "rest", "size"], "split"),
        concat(&["batch", "count", "rest"], "join"),
    ];
    graph.node.splice(0..0, shapes);
    graph.input = vec![f32_value("x", &[-1, -2, WIDTH]), f32_value("mask", &[-1, 1, 1, -4])];
    graph.output = vec![f32_value("y", &[-1, -2, WIDTH])];
    model
}

#[test]
fn open_numbers_of_rows_stay() {
    assert_eq!(fuse(&mut open(), |dtype| dtype == F32), 0);
}

#[test]
fn other_element_types_stay() {
    let scores = vec![node("MatMul", &["qt", "kt"], &["scores"]), node("Softmax", &["scores"], &["weights"])];
    assert_eq!(fuse(&mut attention(&[0, 2, 3, 1], scores, &[1]), |dtype| dtype == F16), 0);
}

#[test]
fn what_only_looks_like_attention_stays() {
    let softmax = |axis| with_int(node("Softmax", &["scores"], &["weights"]), "axis", axis);
    let scores = |softmax| vec![node("MatMul", &["qt", "kt"], &["scores"]), softmax];
    let stays = |mut model: ModelProto| {
        let before = model.clone();
        assert_eq!(fuse(&mut model, |dtype| dtype == F32), 0);
        assert_eq!(model, before);
    };
    stays(attention(&[0, 2, 3, 1], scores(softmax(2)), &[1]));
    let mut read = attention(&[0, 2, 3, 1], scores(softmax(-1)), &[1]);
    read.graph.as_mut().unwrap().output.push(f32_value("weights", &[1, HEADS, ROWS, ROWS]));
    stays(read);
    let mut joined = attention(&[0, 2, 3, 1], scores(softmax(-1)), &[1]);
    for tensor in &mut joined.graph.as_mut().unwrap().initializer {
        if tensor.name() == "join" {
            *tensor = ints("join", &[0, 0, 0, 16]);
        }
    }
    stays(joined);
    let mut other_heads = attention(&[0, 2, 3, 1], scores(softmax(-1)), &[1]);
    let graph = other_heads.graph.as_mut().unwrap();
    graph.initializer.push(ints("other", &[1, ROWS, 2, 32]));
    let value = graph.node.iter_mut().find(|node| node.output[0] == "vfour").unwrap();
    value.input[1] = "other".to_owned();
    stays(other_heads);
}

fn in_microsofts(node: NodeProto) -> NodeProto {
    NodeProto { domain: Some("com.microsoft".to_owned()), ..node }
}
