//! Requests of one function that may share runs, beside the same requests each alone: 16 in flight, one lane.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use faaswap_engine::{Input, InputData, PlainSession, Target, prepare::is_close};
use faaswap_protocol::{Batching, DType, Shape};
use faaswap_sidecar::broker::{Broker as Client, InferRequest};
use tokio::task::JoinSet;

use super::{Figures, service, title};
use crate::{
    Result, Trouble, cache, models,
    node::{Broker, BrokerOptions, DeviceOptions},
    process::temporary_folder,
    random::Random,
};

const IN_FLIGHT: usize = 16;
/// Inputs of their own, so that an answer to another request is found.
const INPUTS: usize = 32;
/// Turns of each way, after one that does not count.
const TURNS: usize = 6;
/// Requests of one way before the next way's turn.
const BLOCK: usize = 160;
const WAYS: [(&str, Batching); 3] = [("off", Batching::Off), ("exact", Batching::Exact), ("on", Batching::On)];

/// What inputs hold.
#[derive(Clone, Copy)]
enum Numbers {
    /// Bytes of a file and one value for none, as whole numbers.
    Bytes,
    Floats,
}

struct Case {
    name: &'static str,
    numbers: Numbers,
    path: PathBuf,
    dims: Vec<u64>,
}

/// An input and what it gives alone.
struct Known {
    request: InferRequest,
    expected: Vec<u8>,
}

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title(
        "requests per second with 16 in flight, one lane (alone; sharing runs with the same bits; with other rounding)",
    );
    println!("  model                    off    exact   ratio      on   ratio");
    let folder = temporary_folder(&std::env::temp_dir())?;
    let chain = folder.path().join("chain.onnx");
    models::write(&models::matmul_chain(512, 12, 3), &chain)?;
    let cases = [
        Case { name: "12 MatMuls", numbers: Numbers::Floats, path: chain, dims: vec![1, 512] },
        Case { name: "file type", numbers: Numbers::Bytes, path: cache::model("magika.onnx")?, dims: vec![1, 2048] },
        Case {
            name: "text recognition",
            numbers: Numbers::Floats,
            path: cache::model("ch_PP-OCRv4_rec_infer.onnx")?,
            dims: vec![1, 3, 48, 96],
        },
    ];
    let broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "96MiB")]))?;
    for (index, case) in cases.iter().enumerate() {
        let [off, exact, on] = measure(figures, &broker, index, case)?;
        println!("  {:20} {off:7.0} {exact:8.0} {:7.2} {on:7.0} {:7.2}", case.name, exact / off, on / off);
        let key = case.name.replace(' ', "_");
        for ((way, _), rate) in WAYS.iter().zip([off, exact, on]) {
            figures.set(&format!("batching_{key}_{way}_per_s"), rate);
        }
    }
    Ok(())
}

fn known(case: &Case) -> Result<Vec<Known>> {
    let plain = PlainSession::open(&cache::runtime()?, &case.path, false)?;
    let shape = Shape::new(case.dims.clone()).map_err(|e| Trouble::new(e.to_string()))?;
    let dtype = match case.numbers {
        Numbers::Bytes => DType::I32,
        Numbers::Floats => DType::F32,
    };
    let mut random = Random::new(11);
    let mut one = || -> Result<Known> {
        let value = |_: u64| match case.numbers {
            Numbers::Bytes => i32::try_from(random.below(257)).unwrap_or(0).to_le_bytes(),
            Numbers::Floats => random.signed().to_le_bytes(),
        };
        let data: Vec<u8> = (0..case.dims.iter().product()).flat_map(value).collect();
        let expected = plain.run(&[Input { dtype, shape: &shape, data: InputData::Bytes(&data) }])?.remove(0).1;
        Ok(Known { request: service::request(dtype, &case.dims, Bytes::from(data))?, expected })
    };
    (0..INPUTS).map(|_| one()).collect()
}

fn measure(figures: &mut Figures, broker: &Broker, index: usize, case: &Case) -> Result<[f64; 3]> {
    let runtime = service::runtime()?;
    let known: Arc<Vec<Known>> = Arc::new(known(case)?);
    let mut clients = Vec::new();
    for (way, batching) in WAYS {
        let name = format!("batching-{index}-{way}");
        clients.push(runtime.block_on(async {
            let client = service::start_with(broker, &name, &case.path, batching)?;
            service::ready(&client).await?;
            Ok::<_, Trouble>(Arc::new(client))
        })?);
    }
    let mut took = [Duration::ZERO; 3];
    for turn in 0..=TURNS {
        for (at, client) in clients.iter().enumerate() {
            let begun = Instant::now();
            let right = runtime.block_on(block(client, &known, WAYS[at].1))?;
            if turn > 0 {
                took[at] += begun.elapsed();
            }
            right.into_iter().for_each(|right| figures.check(right));
        }
    }
    let count = u32::try_from(TURNS * BLOCK).unwrap_or(u32::MAX);
    Ok(took.map(|took| f64::from(count) / took.as_secs_f64()))
}

/// So many requests, so many of them at a time; whether each answer was right.
async fn block(client: &Arc<Client>, known: &Arc<Vec<Known>>, batching: Batching) -> Result<Vec<bool>> {
    let mut tasks = JoinSet::new();
    for worker in 0..IN_FLIGHT {
        let (client, known) = (Arc::clone(client), Arc::clone(known));
        tasks.spawn(async move {
            let mut right = Vec::new();
            for round in 0..BLOCK / IN_FLIGHT {
                let one = &known[(worker + round * 7) % known.len()];
                let answer = service::infer(&client, &one.request).await?;
                let data = &answer.outputs[0].data[..];
                let close = || is_close(Target::Cpu, answer.outputs[0].dtype, data, &one.expected);
                right.push(data == one.expected || (batching == Batching::On && close()));
            }
            Ok::<_, Trouble>(right)
        });
    }
    let mut all = Vec::new();
    while let Some(done) = tasks.join_next().await {
        all.extend(done.map_err(|e| Trouble::new(e.to_string()))??);
    }
    Ok(all)
}
