//! A resident run on a lane of the broker, beside plain ONNX Runtime sessions with and without prepacked weights.

use std::{path::PathBuf, time::Instant};

use bytes::Bytes;
use faaswap_engine::{Input, InputData, PlainSession};
use faaswap_protocol::{DType, Shape};

use super::{Figures, p50, service, title};
use crate::{
    Result, Trouble, cache, models,
    node::{Broker, BrokerOptions, DeviceOptions},
    process::temporary_folder,
    random::Random,
};

/// Runs of each kind that count.
const ROUNDS: usize = 120;
const WARM_UP: usize = 10;
/// Runs of one kind before the next kind's turn.
const BLOCK: usize = 10;

struct Case {
    name: &'static str,
    path: PathBuf,
    dims: Vec<u64>,
}

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title("resident run, p50 ms (time on the lane; ratios to plain sessions in this process)");
    println!("  model             broker   plain  ratio   prepacked  ratio");
    let folder = temporary_folder(&std::env::temp_dir())?;
    let chain = folder.path().join("chain.onnx");
    models::write(&models::matmul_chain(512, 12, 3), &chain)?;
    let cases = [
        Case { name: "text detection", path: cache::model("ch_PP-OCRv4_det_infer.onnx")?, dims: vec![1, 3, 320, 320] },
        Case { name: "text recognition", path: cache::model("ch_PP-OCRv4_rec_infer.onnx")?, dims: vec![1, 3, 48, 320] },
        Case { name: "pitch detection", path: cache::model("nmp.onnx")?, dims: vec![1, 43844, 1] },
        Case { name: "12 MatMuls", path: chain, dims: vec![16, 512] },
    ];
    let broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "96MiB")]))?;
    let (mut same, mut packed) = (Vec::new(), Vec::new());
    for (index, case) in cases.iter().enumerate() {
        let (to_plain, to_packed) = measure(figures, &broker, index, case)?;
        same.push(to_plain);
        packed.push(to_packed);
    }
    figures.set("resident_ratio", mean(&same));
    figures.set("resident_ratio_worst", same.iter().copied().fold(f64::NAN, f64::max));
    figures.set("resident_to_prepacked_ratio", mean(&packed));
    println!("  geometric mean: {:.3} of plain, {:.3} of prepacked", mean(&same), mean(&packed));
    Ok(())
}

/// The geometric mean, which is the one for ratios.
fn mean(ratios: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let count = ratios.len() as f64;
    (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / count).exp()
}

fn measure(figures: &mut Figures, broker: &Broker, index: usize, case: &Case) -> Result<(f64, f64)> {
    let mut random = Random::new(11);
    let elements: u64 = case.dims.iter().product();
    let data: Vec<u8> = (0..elements).flat_map(|_| random.signed().to_le_bytes()).collect();
    let shape = Shape::new(case.dims.clone()).map_err(|e| Trouble::new(e.to_string()))?;
    let plain = PlainSession::open(&cache::runtime()?, &case.path, false)?;
    let packed = PlainSession::open(&cache::runtime()?, &case.path, true)?;
    let input = || Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(&data) };
    let expected = plain.run(&[input()])?;
    let runtime = service::runtime()?;
    let client = runtime.block_on(async {
        let client = service::start(broker, &format!("resident-{index}"), &case.path)?;
        service::ready(&client).await?;
        Ok::<_, Trouble>(client)
    })?;
    let request = service::request(DType::F32, &case.dims, Bytes::from(data.clone()))?;
    let (mut on_lane, mut alone, mut prepacked) = (Vec::new(), Vec::new(), Vec::new());
    for block in 0..(WARM_UP + ROUNDS) / BLOCK {
        for _ in 0..BLOCK {
            let answer = runtime.block_on(service::infer(&client, &request))?;
            let right = answer.outputs.len() == expected.len()
                && answer.outputs.iter().zip(&expected).all(|(have, (_, want))| have.data[..] == want[..]);
            figures.check(right);
            on_lane.push(answer.timing.ran);
        }
        for _ in 0..BLOCK {
            let start = Instant::now();
            let outputs = plain.run(&[input()])?;
            alone.push(start.elapsed());
            figures.check(outputs == expected);
        }
        for _ in 0..BLOCK {
            let start = Instant::now();
            packed.run(&[input()])?;
            prepacked.push(start.elapsed());
        }
        if block < WARM_UP / BLOCK {
            [&mut on_lane, &mut alone, &mut prepacked].into_iter().for_each(Vec::clear);
        }
    }
    let (ours, alone, prepacked) = (p50(&mut on_lane), p50(&mut alone), p50(&mut prepacked));
    println!(
        "  {:16} {ours:7.2} {alone:7.2} {:6.3} {prepacked:11.2} {:6.3}",
        case.name,
        ours / alone,
        ours / prepacked
    );
    Ok((ours / alone, ours / prepacked))
}
