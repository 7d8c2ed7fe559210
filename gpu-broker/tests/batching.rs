//! Requests that share runs: each gets its own outputs, and nobody is hurt by another one.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    clippy::wildcard_enum_match_arm,
    reason = "tests"
)]

mod common;

use common::{
    Broker, Client,
    bursts::{ONE_LANE, ROUNDS, ROUNDS_MAX, answers, bytes, register, rounds},
    model::{Linear, lookup, node, table, value, write_graph},
};
use faaswap_engine::{Target, onnx::ModelProto, prepare::is_close};
use faaswap_protocol::{Batching, DType, FunctionId, Refusal, RequestId, Shape, Span, TensorSlice, ToBroker};
use prost::Message;

/// In one burst: more than go into one run.
const BURST: usize = 24;
const SHARED: &str = "faaswap_shared_run_requests_total";

fn shared_requests(broker: &Broker) -> f64 {
    broker.metric(SHARED)
}

/// Sends bursts of requests with inputs of their own, and checks every answer.
fn bursts(client: &mut Client, function: FunctionId, model: &Linear, rounds: impl Iterator<Item = usize>) {
    let size = model.size as u64;
    for round in rounds {
        let asked: Vec<_> = (0..BURST)
            .map(|n| {
                let input = model.input(round * BURST + n);
                let id = client.ask_bytes(function, (DType::F32, &[1, size]), &bytes(&input), n as u64 * size * 4);
                (id, input)
            })
            .collect();
        let mut answers = answers(client, BURST);
        for (id, input) in asked {
            let answer = answers.remove(&id).unwrap().unwrap();
            assert_eq!(answer.outputs[0].0.shape.dims(), [1, size]);
            assert_eq!(answer.floats(), model.expected(&input), "round {round}");
        }
    }
}

#[test]
fn requests_that_share_a_run_get_their_own_outputs_in_the_slab_and_over_tcp() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 256, seed: 2 };
    let file = model.write(broker.dir.path());
    for (n, mut client) in [Client::greeted(&broker), Client::inline(&broker)].into_iter().enumerate() {
        let before = shared_requests(&broker);
        let function = register(&mut client, &format!("f{n}"), &file, Batching::Exact);
        bursts(&mut client, function, &model, rounds(&broker, SHARED));
        assert!(shared_requests(&broker) > before, "some have shared a run");
    }
}

#[test]
fn decisions_say_how_many_requests_a_run_answers() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 128, seed: 6 };
    let mut client = Client::greeted(&broker);
    let function = register(&mut client, "shown", &model.write(broker.dir.path()), Batching::Exact);
    let together = |decision: &serde_json::Value| decision["requests"].as_u64().unwrap() > 1;
    let shown = (0..ROUNDS_MAX).any(|round| {
        bursts(&mut client, function, &model, round..=round);
        broker.get("/v1/decisions").as_array().unwrap().iter().any(together)
    });
    assert!(shown, "{}", broker.get("/v1/decisions"));
}

#[test]
fn a_function_that_wants_each_request_alone_gets_that() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 128, seed: 1 };
    let mut client = Client::greeted(&broker);
    let function = register(&mut client, "alone", &model.write(broker.dir.path()), Batching::Off);
    bursts(&mut client, function, &model, 0..ROUNDS);
    assert_eq!(shared_requests(&broker), 0.0);
}

#[test]
fn shapes_that_differ_and_requests_of_several_rows_run_apart_and_are_right() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 64, seed: 5 };
    let mut client = Client::inline(&broker);
    let function = register(&mut client, "rows", &model.write(broker.dir.path()), Batching::On);
    for round in rounds(&broker, SHARED) {
        let asked: Vec<_> = (0..BURST)
            .map(|n| {
                let rows = [1, 1, 1, 3][n % 4];
                let inputs: Vec<_> = (0..rows).map(|row| model.input(round + 7 * n + row)).collect();
                let id = client.ask_bytes(function, (DType::F32, &[rows as u64, 64]), &bytes(&inputs.concat()), 0);
                (id, inputs)
            })
            .collect();
        let mut answers = answers(&mut client, BURST);
        for (id, inputs) in asked {
            let expected: Vec<f32> = inputs.iter().flat_map(|input| model.expected(input)).collect();
            assert_eq!(answers.remove(&id).unwrap().unwrap().floats(), expected);
        }
    }
    assert!(shared_requests(&broker) > 0.0);
}

/// A position outside the table fails the run.
#[test]
fn a_poisoned_request_fails_alone() {
    let broker = Broker::start(ONE_LANE);
    let (file, values) = lookup(broker.dir.path());
    let mut client = Client::inline(&broker);
    let function = register(&mut client, "lookup", &file, Batching::Exact);
    let (mut sent, mut poisoned) = (0, 0);
    for round in rounds(&broker, SHARED) {
        let asked: Vec<_> = (0..BURST)
            .map(|n| {
                let bad = round > 2 && n == 5 + round % 16;
                sent += usize::from(bad);
                let positions = [n, n + 1, 2 * n, if bad { 5000 } else { 7 }].map(|at| at as i64);
                let raw: Vec<u8> = positions.iter().flat_map(|at| at.to_le_bytes()).collect();
                (client.ask_bytes(function, (DType::I64, &[1, 4]), &raw, 0), positions, bad)
            })
            .collect();
        let mut answers = answers(&mut client, BURST);
        for (id, positions, bad) in asked {
            match answers.remove(&id).unwrap() {
                Ok(answer) => {
                    let expected: Vec<f32> = positions.iter().map(|at| values[usize::try_from(*at).unwrap()]).collect();
                    assert_eq!((bad, answer.floats()), (false, expected));
                }
                Err(Refusal::RunFailed { .. }) if bad => poisoned += 1,
                Err(refusal) => panic!("{refusal} (poisoned: {bad})"),
            }
        }
    }
    assert!(sent > 0 && poisoned == sent, "{poisoned} of {sent}");
    assert!(shared_requests(&broker) > 0.0);
}

/// Takes from each row the mean of all rows: alone a row gives zeros, together it does not.
#[test]
fn rows_that_depend_on_each_other_are_found_out_and_run_alone() {
    let broker = Broker::start(ONE_LANE);
    let weights: Vec<f32> = (0..1024_u16).map(f32::from).collect();
    let mut mean = node("ReduceMean", &["sum"], "mean");
    mean.attribute = vec![common::model::integers("axes", &[0])];
    let nodes = vec![node("Add", &["x", "w"], "sum"), mean, node("Sub", &["sum", "mean"], "y")];
    let graph = (nodes, vec![table("w", &[1024], &weights)]);
    let file = write_graph(broker.dir.path(), "mean", graph, (value("x", &[-1, 1024]), value("y", &[-1, 1024])));
    for (name, salts) in [("different", 97), ("equal", 1)] {
        let mut client = Client::inline(&broker);
        let function = register(&mut client, name, &file, Batching::On);
        for round in rounds(&broker, SHARED) {
            for n in 0..BURST {
                let input = Linear { size: 1024, seed: 0 }.input((round * BURST + n) % salts);
                client.ask_bytes(function, (DType::F32, &[1, 1024]), &bytes(&input), 0);
            }
            for (_, answer) in answers(&mut client, BURST) {
                assert!(answer.unwrap().floats().iter().all(|value| *value == 0.0), "no row sees another one");
            }
        }
    }
    assert!(shared_requests(&broker) > 0.0 && broker.metric("faaswap_shared_runs_apart_total") > 0.0);
}

#[test]
fn peers_that_cancel_or_go_leave_the_others_of_their_runs_alone() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 256, seed: 4 };
    let file = model.write(broker.dir.path());
    let mut steady = Client::greeted(&broker);
    let function = register(&mut steady, "shared", &file, Batching::Exact);
    for round in rounds(&broker, SHARED) {
        // The same name and specification: one function, whose requests share runs over connections.
        let mut fickle = Client::greeted(&broker);
        let theirs = register(&mut fickle, "shared", &file, Batching::Exact);
        let input = model.input(round);
        let asked: Vec<_> = (0..BURST)
            .map(|n| {
                let id = fickle.ask_bytes(theirs, (DType::F32, &[1, 256]), &bytes(&model.input(n)), n as u64 * 1024);
                if n % 3 == 0 {
                    fickle.say(&ToBroker::Cancel { request: id }, &[]);
                }
                steady.ask_bytes(function, (DType::F32, &[1, 256]), &bytes(&input), n as u64 * 1024)
            })
            .collect();
        drop(fickle);
        let answers = answers(&mut steady, BURST);
        for id in asked {
            assert_eq!(answers[&id].as_ref().unwrap().floats(), model.expected(&input));
        }
    }
    assert!(steady.is_served());
    common::wait_for("all requests to leave", || broker.metric("faaswap_requests_in_flight") == 0.0);
    assert!(shared_requests(&broker) > 0.0);
}

/// Numbers that look like chance, the same each time.
fn scattered(seed: u64, len: usize) -> impl Iterator<Item = u64> {
    let mixed = move |n: u64| (n ^ seed.rotate_left(17)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
    (0..len as u64).map(move |n| mixed(mixed(n + 1)) >> 40)
}

/// Models as people use them: whatever is answered together equals what each gives alone, to the bit where that was wanted.
#[test]
fn real_models_answer_together_what_they_answer_alone() {
    let models = std::env::var_os("FAASWAP_MODELS_DIR").map_or_else(
        || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/models"),
        std::path::PathBuf::from,
    );
    let broker = Broker::start("[[device]]\nmemory = \"64MiB\"\nchunk = \"64KiB\"");
    let cases: [(&str, DType, &[u64]); 3] = [
        ("magika.onnx", DType::I32, &[1, 2048]),
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", DType::F32, &[1, 3, 48, 192]),
        ("ch_PP-OCRv4_rec_infer.onnx", DType::F32, &[1, 3, 48, 96]),
    ];
    for (name, dtype, shape) in cases {
        let len = usize::try_from(shape.iter().product::<u64>()).unwrap();
        let input = |salt: u64| -> Vec<u8> {
            let float = |value: u64| (value % 2001) as f32 / 1000.0 - 1.0;
            let encode = |value: u64| match dtype {
                DType::I32 => i32::try_from(value % 257).unwrap().to_le_bytes(),
                _ => float(value).to_le_bytes(),
            };
            scattered(salt, len).flat_map(encode).collect()
        };
        let mut client = Client::inline(&broker);
        let mut function =
            |batching| register(&mut client, &format!("{name}-{batching:?}"), &models.join(name), batching);
        let [off, exact, on] = [Batching::Off, Batching::Exact, Batching::On].map(&mut function);
        let before = shared_requests(&broker);
        for (round, burst) in scattered(7, 100).enumerate() {
            if round >= 6 && shared_requests(&broker) > before {
                break;
            }
            let burst = 2 + usize::try_from(burst % 12).unwrap();
            let inputs: Vec<_> = (0..burst as u64).map(|n| input(round as u64 * 100 + n)).collect();
            let mut ask = |function| -> Vec<Vec<u8>> {
                let asked: Vec<_> =
                    inputs.iter().map(|input| client.ask_bytes(function, (dtype, shape), input, 0)).collect();
                let mut answers = answers(&mut client, burst);
                asked.iter().map(|id| answers.remove(id).unwrap().unwrap().outputs.remove(0).1).collect()
            };
            let [alone, exactly, closely] = [off, exact, on].map(&mut ask);
            assert!(exactly == alone, "{name}: other bits");
            let close = |(ours, theirs): (&Vec<u8>, &Vec<u8>)| is_close(Target::Cpu, DType::F32, ours, theirs);
            assert!(closely.iter().zip(&alone).all(close), "{name}: more than rounding");
        }
        assert!(shared_requests(&broker) > before, "{name} has shared runs");
    }
}

/// The first output is each row itself; the second one is what it differs by from the mean of all. Whoever asks for the first one
/// had the size tried, and it was right: then the second one was asked for, and came out of runs together.
#[test]
fn what_was_tried_with_some_outputs_says_nothing_of_others() {
    let broker = Broker::start(ONE_LANE);
    let mut mean = node("ReduceMean", &["y"], "mean");
    mean.attribute = vec![common::model::integers("axes", &[0])];
    let nodes = vec![node("Add", &["x", "w"], "y"), mean, node("Sub", &["y", "mean"], "z")];
    let graph = (nodes, vec![table("w", &[64], &[1.0; 64])]);
    let file = write_graph(broker.dir.path(), "two", graph, (value("x", &[-1, 64]), value("y", &[-1, 64])));
    let mut proto = ModelProto::decode(std::fs::read(&file).unwrap().as_slice()).unwrap();
    proto.graph.as_mut().unwrap().output.push(value("z", &[-1, 64]));
    std::fs::write(&file, proto.encode_to_vec()).unwrap();
    let mut client = Client::inline(&broker);
    let function = register(&mut client, "two", &file, Batching::On);
    let model = Linear { size: 64, seed: 0 };
    for wanted in [0, 1] {
        for round in rounds(&broker, SHARED) {
            let inputs: Vec<_> = (0..BURST).map(|n| model.input(round * BURST + n)).collect();
            let asked = |n: usize| RequestId((1 + u64::from(wanted)) << 32 | (round * BURST + n) as u64);
            for (n, input) in inputs.iter().enumerate() {
                let span = Span { offset: 0, len: 256 };
                let shape = Shape::new([1, 64]).unwrap();
                let inputs = vec![TensorSlice { index: 0, dtype: DType::F32, shape, span }];
                let (request, outputs) = (asked(n), vec![wanted]);
                client.say(&ToBroker::Infer { request, function, inputs, outputs, time_left: None }, &bytes(input));
            }
            let mut answers = answers(&mut client, BURST);
            for (n, input) in inputs.iter().enumerate() {
                let expected: Vec<f32> = input.iter().map(|x| if wanted == 0 { x + 1.0 } else { 0.0 }).collect();
                assert_eq!(answers.remove(&asked(n)).unwrap().unwrap().floats(), expected, "output {wanted}");
            }
        }
    }
}
