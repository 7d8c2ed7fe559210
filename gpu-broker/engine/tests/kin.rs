//! Models of one kind are prepared by what was prepared for the first: the same files come of it as of preparing each.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use std::{fs, path::Path};

use common::{Made, build::*, equals_a_plain_session, load, prepare, runtime, with_inputs};
use faaswap_engine::{
    EngineError, PlainSession, Runtime,
    onnx::ModelProto,
    prepare::kin::{Kin, ShareJob, Shared, share},
};
use faaswap_protocol::{
    Bytes,
    DType::{F32, F64},
};
use prost::Message;

/// A transposed matrix, a matrix, a small bias and a scalar; `seed` makes the weights.
fn variant(seed: usize, epsilon: usize) -> ModelProto {
    let nodes = vec![
        node("Transpose", &["w1"], &["t"]),
        node("MatMul", &["x", "t"], &["h"]),
        node("Relu", &["h"], &["r"]),
        node("MatMul", &["r", "w2"], &["z"]),
        node("Add", &["z", "b"], &["s"]),
        node("Add", &["s", "e"], &["y"]),
    ];
    let weights = vec![
        weight("w1", F32, &[32, 64], seed),
        weight("w2", F32, &[32, 48], seed + 1),
        weight("b", F32, &[48], seed + 2),
        weight("e", F32, &[1], epsilon),
    ];
    model(graph(nodes, vec![f32_value("x", &[-1, 64])], vec![f32_value("y", &[-1, 48])], weights))
}

fn job(graph: &Path, kin_dir: &Path, out: &Path, may_learn: bool) -> ShareJob {
    ShareJob {
        model_dir: graph.parent().unwrap().to_owned(),
        graph_file: graph.file_name().unwrap().to_str().unwrap().to_owned(),
        kin_dir: kin_dir.to_owned(),
        out_dir: out.to_owned(),
        group_bytes: Bytes::mib(1),
        may_learn,
    }
}

fn no_runtime() -> Result<Runtime, EngineError> {
    panic!("nothing is to be learnt")
}

/// Prepares a model as the first of its kind.
fn first(model: &ModelProto, dir: &Path) -> (tempfile::TempDir, String) {
    let (folder, graph) = write(model);
    let (kin_dir, out) = (dir.join("kin"), dir.join("first"));
    let alone = share(no_runtime, &job(&graph, &kin_dir, &out, true)).unwrap();
    let Shared::Alone { kind, is_first: true, .. } = alone else { panic!("{alone:?}") };
    prepare(&graph, &out).unwrap();
    let (model_dir, graph_file) = (folder.path().to_owned(), graph.file_name().unwrap().to_str().unwrap().to_owned());
    Kin { model_dir, graph_file, prepared_dir: out }.name(&kin_dir, &kind).unwrap();
    (folder, kind)
}

#[test]
fn a_variant_is_prepared_as_it_would_be_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (_first, _) = first(&variant(1, 9), dir.path());
    let kin_dir = dir.path().join("kin");
    for (number, seed) in [11_usize, 21, 31].into_iter().enumerate() {
        let (_folder, graph) = write(&variant(seed, 9));
        let (out, alone) = (dir.path().join(format!("variant-{seed}")), dir.path().join(format!("alone-{seed}")));
        let shared = match number {
            0 => {
                let unlearnt = share(no_runtime, &job(&graph, &kin_dir, &out, false)).unwrap();
                assert!(matches!(unlearnt, Shared::Alone { is_first: false, is_learnable: true, .. }), "{unlearnt:?}");
                share(|| Ok(runtime()), &job(&graph, &kin_dir, &out, true)).unwrap()
            }
            _ => share(no_runtime, &job(&graph, &kin_dir, &out, false)).unwrap(),
        };
        assert_eq!(shared, Shared::Prepared, "{:?}", fs::read_to_string(dir.path().join("first/recipe.json")));
        prepare(&graph, &alone).unwrap();
        let read = |dir: &Path, file: &str| fs::read(dir.join(file)).unwrap();
        assert_eq!(read(&out, "weights.bin"), read(&alone, "weights.bin"));
        let nodes = |dir| ModelProto::decode(&read(dir, "model.onnx")[..]).unwrap().graph.unwrap().node;
        assert_eq!(nodes(&out), nodes(&alone));
        let inputs = [Made::new(F32, &[3, 64], seed)];
        let plain = PlainSession::open(&runtime(), &graph, false).unwrap();
        let loaded = load(&out);
        let done = loaded.swap_in();
        with_inputs(&inputs, |inputs| assert_eq!(loaded.run(inputs).unwrap(), plain.run(inputs).unwrap()));
        done.recv().unwrap();
        equals_a_plain_session(&graph, &inputs);
    }
}

#[test]
fn another_constant_is_another_kind_and_other_weights_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let (_first, kind) = first(&variant(1, 9), dir.path());
    let kind_of = |model: &ModelProto| {
        let (_folder, graph) = write(model);
        match share(no_runtime, &job(&graph, &dir.path().join("none"), &dir.path().join("unused"), false)).unwrap() {
            Shared::Alone { kind, .. } => kind,
            Shared::Prepared => panic!("there is no kin"),
        }
    };
    assert_eq!(kind_of(&variant(5, 9)), kind);
    assert_ne!(kind_of(&variant(1, 8)), kind);
    let mut renamed = variant(1, 9);
    renamed.producer_name = Some("another exporter".to_owned());
    assert_eq!(kind_of(&renamed), kind, "who wrote it does not matter");
}

#[test]
fn weights_that_are_computed_from_others_are_prepared_model_by_model() {
    let dir = tempfile::tempdir().unwrap();
    let computed = |seed| {
        let nodes = vec![node("Mul", &["a", "b"], &["w"]), node("MatMul", &["x", "w"], &["y"])];
        let weights = vec![weight("a", F32, &[32, 32], seed), weight("b", F32, &[32, 32], seed + 1)];
        model(graph(nodes, vec![f32_value("x", &[-1, 32])], vec![f32_value("y", &[-1, 32])], weights))
    };
    let (_first, _) = first(&computed(1), dir.path());
    let (_folder, graph) = write(&computed(4));
    let (kin_dir, out) = (dir.path().join("kin"), dir.path().join("out"));
    for may_learn in [true, false] {
        let shared = share(|| Ok(runtime()), &job(&graph, &kin_dir, &out, may_learn)).unwrap();
        assert!(matches!(shared, Shared::Alone { is_first: false, is_learnable: false, .. }), "{shared:?}");
    }
}

#[test]
fn weights_of_doubles_in_another_file_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let typed = |seed| {
        let element = faaswap_engine::onnx::element_of(F64);
        let (x, y) = (value("x", element, &[-1, 40]), value("y", element, &[-1, 40]));
        let nodes = vec![node("MatMul", &["x", "w"], &["z"]), node("Add", &["z", "c"], &["y"])];
        let (mut w, c) = (weight("w", F64, &[40, 40], seed), weight("c", F64, &[40], seed + 1));
        let data = w.raw_data.take().unwrap();
        w.set_external("w.bin", 64, data.len() as u64);
        let (folder, path) = write(&model(graph(nodes, vec![x], vec![y], vec![w, c])));
        fs::write(folder.path().join("w.bin"), [&[0; 64][..], &data].concat()).unwrap();
        (folder, path)
    };
    let kin_dir = dir.path().join("kin");
    let (first, graph) = typed(1);
    let out = dir.path().join("first");
    let alone = share(no_runtime, &job(&graph, &kin_dir, &out, false)).unwrap();
    let Shared::Alone { kind, .. } = alone else { panic!("{alone:?}") };
    prepare(&graph, &out).unwrap();
    let graph_file = graph.file_name().unwrap().to_str().unwrap().to_owned();
    Kin { model_dir: first.path().to_owned(), graph_file, prepared_dir: out }.name(&kin_dir, &kind).unwrap();
    let (_second, graph) = typed(7);
    let out = dir.path().join("second");
    assert_eq!(share(|| Ok(runtime()), &job(&graph, &kin_dir, &out, true)).unwrap(), Shared::Prepared);
    prepare(&graph, &dir.path().join("alone")).unwrap();
    let read = |dir: &Path| fs::read(dir.join("weights.bin")).unwrap();
    assert_eq!(read(&out), read(&dir.path().join("alone")));
}
