//! Functions that run the same model share runs where both allow it: each gets its own outputs, and keeps its own books.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    clippy::wildcard_enum_match_arm,
    reason = "tests"
)]

mod common;

use std::{collections::BTreeMap, path::Path};

use common::{
    Answer, Broker, Client,
    bursts::{ONE_LANE, ROUNDS, answers, bytes, register, rounds},
    model::{Linear, lookup, node, table, value, write_graph},
};
use faaswap_protocol::{Batching, DType, FunctionId, Refusal, RequestId, ToBroker};

/// In one burst of each function.
const BURST: usize = 12;
const MIXED: &str = "faaswap_mixed_runs_total";
const APART: &str = "faaswap_shared_runs_apart_total";

/// A function on a connection of its own.
struct Tenant {
    client: Client,
    function: FunctionId,
}

impl Tenant {
    fn of(mut client: Client, name: &str, file: &Path, batching: Batching) -> Self {
        let function = register(&mut client, name, file, batching);
        Self { client, function }
    }

    fn ask(&mut self, nth: usize, input: &[f32]) -> RequestId {
        let bytes = bytes(input);
        let (shape, offset) = ([1, input.len() as u64], (nth * bytes.len()) as u64);
        self.client.ask_bytes(self.function, (DType::F32, &shape), &bytes, offset)
    }

    fn answers(&mut self, count: usize) -> BTreeMap<RequestId, Result<Answer, Refusal>> {
        answers(&mut self.client, count)
    }
}

/// Bursts of both, one request of each in turn, with inputs of their own; every answer is checked.
fn bursts(both: &mut [Tenant; 2], model: &Linear, rounds: impl Iterator<Item = usize>) -> usize {
    let mut asked_of_each = 0;
    for round in rounds {
        let mut asked = Vec::new();
        for nth in 0..2 * BURST {
            let input = model.input(round * 2 * BURST + nth);
            asked.push((nth % 2, both[nth % 2].ask(nth / 2, &input), input));
        }
        let mut answers = both.each_mut().map(|tenant| tenant.answers(BURST));
        asked_of_each += BURST;
        for (whose, id, input) in asked {
            let answer = answers[whose].remove(&id).unwrap().unwrap();
            assert_eq!(answer.outputs[0].0.shape.dims(), [1, model.size as u64]);
            assert_eq!(answer.floats(), model.expected(&input), "round {round}");
        }
        assert!(answers.iter().all(BTreeMap::is_empty), "nobody gets another one's answer");
    }
    asked_of_each
}

#[test]
fn requests_of_two_functions_share_runs_and_each_gets_its_own_outputs_and_books() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 256, seed: 2 };
    let file = model.write(broker.dir.path());
    let slab = Tenant::of(Client::greeted(&broker), "team-a/one", &file, Batching::Exact);
    let inline = Tenant::of(Client::inline(&broker), "team-b/two", &file, Batching::On);
    let mut both = [slab, inline];
    let asked = bursts(&mut both, &model, rounds(&broker, MIXED));
    assert!(broker.metric(MIXED) > 0.0, "some runs answered both");
    for name in ["team-a/one", "team-b/two"] {
        common::wait_for("the books to say so", || {
            let functions = broker.get("/v1/functions");
            let function = functions.as_array().unwrap().iter().find(|function| function["name"] == name).unwrap();
            (function["answered"].as_u64(), function["refused"].as_u64()) == (Some(asked as u64), Some(0))
        });
        let answered = format!("faaswap_requests_total{{function=\"{name}\",outcome=\"answered\"}}");
        assert_eq!(broker.metric(&answered), asked as f64);
    }
}

#[test]
fn a_function_that_is_off_shares_no_run_whatever_others_say() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 128, seed: 1 };
    let file = model.write(broker.dir.path());
    let willing = Tenant::of(Client::inline(&broker), "willing", &file, Batching::On);
    let off = Tenant::of(Client::greeted(&broker), "off", &file, Batching::Off);
    // The willing one shares runs with itself meanwhile, so there were occasions.
    bursts(&mut [willing, off], &model, rounds(&broker, "faaswap_shared_runs_total"));
    assert!(broker.metric("faaswap_shared_runs_total") > 0.0);
    assert_eq!(broker.metric(MIXED), 0.0);
}

/// A position outside the table fails the run: the other function's requests in it are answered, and those that are right.
#[test]
fn a_poisoned_request_of_one_function_fails_alone_and_the_other_one_s_are_right() {
    let broker = Broker::start(ONE_LANE);
    let (file, values) = lookup(broker.dir.path());
    let honest = Tenant::of(Client::inline(&broker), "honest", &file, Batching::Exact);
    let hostile = Tenant::of(Client::inline(&broker), "hostile", &file, Batching::Exact);
    let mut both = [honest, hostile];
    // Poisoned once they share runs: who poisons early is soon left to itself.
    let clean = rounds(&broker, MIXED).map(|_| false);
    for poisons in clean.chain(rounds(&broker, APART).map(|_| true)) {
        let mut asked = Vec::new();
        for nth in 0..2 * BURST {
            let bad = poisons && nth % 8 == 1;
            let positions = [nth, nth + 1, 2 * nth, if bad { 5000 } else { 7 }].map(|at| at as i64);
            let raw: Vec<u8> = positions.iter().flat_map(|at| at.to_le_bytes()).collect();
            let Tenant { client, function } = &mut both[nth % 2];
            asked.push((nth % 2, client.ask_bytes(*function, (DType::I64, &[1, 4]), &raw, 0), positions, bad));
        }
        let mut answers = both.each_mut().map(|tenant| tenant.answers(BURST));
        for (whose, id, positions, bad) in asked {
            match answers[whose].remove(&id).unwrap() {
                Ok(answer) => {
                    let expected: Vec<f32> = positions.iter().map(|at| values[usize::try_from(*at).unwrap()]).collect();
                    assert_eq!((bad, answer.floats()), (false, expected));
                }
                Err(Refusal::RunFailed { .. }) => assert!(bad, "only what is wrong fails"),
                Err(refusal) => panic!("{refusal}"),
            }
        }
    }
    assert!(broker.metric(MIXED) > 0.0 && broker.metric(APART) > 0.0);
}

#[test]
fn a_function_that_goes_in_the_middle_of_shared_runs_leaves_the_other_one_alone() {
    let broker = Broker::start(ONE_LANE);
    let model = Linear { size: 256, seed: 4 };
    let file = model.write(broker.dir.path());
    let mut steady = Tenant::of(Client::greeted(&broker), "steady", &file, Batching::Exact);
    for round in rounds(&broker, MIXED) {
        let mut fickle = Tenant::of(Client::greeted(&broker), &format!("fickle-{round}"), &file, Batching::Exact);
        let input = model.input(round);
        let asked: Vec<_> = (0..BURST)
            .map(|nth| {
                let id = fickle.ask(nth, &model.input(nth));
                if nth % 3 == 0 {
                    fickle.client.say(&ToBroker::Cancel { request: id }, &[]);
                }
                steady.ask(nth, &input)
            })
            .collect();
        drop(fickle);
        let answers = steady.answers(BURST);
        for id in asked {
            assert_eq!(answers[&id].as_ref().unwrap().floats(), model.expected(&input));
        }
    }
    assert!(steady.client.is_served());
    common::wait_for("all requests to leave", || broker.metric("faaswap_requests_in_flight") == 0.0);
    assert!(broker.metric(MIXED) > 0.0);
}

/// Takes the range of all rows for each: rows of one range go together to the bit, and a wide one spoils those beside it.
/// A function could have had a size tried with rows of one range, and then seen in its answers how wide others' are.
#[test]
fn a_model_that_quantizes_all_rows_by_their_common_range_is_never_shared() {
    let broker = Broker::start(ONE_LANE);
    let mut quantize = node("DynamicQuantizeLinear", &["x"], "q");
    quantize.output = ["q", "scale", "zero"].map(str::to_owned).to_vec();
    let nodes = vec![quantize, node("DequantizeLinear", &["q", "scale", "zero"], "r"), node("Add", &["r", "w"], "y")];
    let graph = (nodes, vec![table("w", &[1024], &[0.0; 1024])]);
    let file = write_graph(broker.dir.path(), "ranges", graph, (value("x", &[-1, 1024]), value("y", &[-1, 1024])));
    let narrow = Tenant::of(Client::inline(&broker), "narrow", &file, Batching::On);
    let wide = Tenant::of(Client::inline(&broker), "wide", &file, Batching::On);
    let mut both = [narrow, wide];
    let row = |nth: usize, range: f32| -> Vec<f32> {
        (nth..nth + 1024).map(|at| if at == nth { range } else { (at % 8) as f32 / 8.0 }).collect()
    };
    for round in 0..4 * ROUNDS {
        let range_of = |whose| if round > ROUNDS && whose == 1 { 1000.0 } else { 1.0 };
        for nth in 0..2 * BURST {
            both[nth % 2].ask(nth / 2, &row(nth, range_of(nth % 2)));
        }
        let [narrow, wide] = both.each_mut().map(|tenant| tenant.answers(BURST));
        for answer in narrow.into_values() {
            let distinct: std::collections::BTreeSet<_> =
                answer.unwrap().floats().into_iter().map(f32::to_bits).collect();
            assert!(distinct.len() >= 8, "round {round}: {} values are left", distinct.len());
        }
        assert!(wide.values().all(Result::is_ok));
    }
    assert_eq!(broker.metric("faaswap_shared_runs_total"), 0.0);
}
