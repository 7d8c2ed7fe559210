//! What going through a sidecar and the broker adds to a run, for an input of 602 kB.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use faaswap_engine::{Input, InputData, PlainSession};
use faaswap_protocol::{DType, Shape};

use super::{Figures, p50, p98, service, title};
use crate::{
    Result, Trouble, cache,
    http::Client,
    models::{self, IMAGE_SIDE},
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    oip::{Outcome, Request, Tensor},
    process::temporary_folder,
    random::Random,
};

/// Requests of each kind that count.
const ROUNDS: usize = 1500;
/// Requests before them that do not.
const WARM_UP: usize = 100;
/// Requests of one kind before the next kind's turn.
const BLOCK: usize = 20;
/// How long each number of requests in flight is kept up.
const LEVEL_LASTS: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title("redirection overhead (input 1x3x224x224 fp32, 602 kB)");
    let folder = temporary_folder(&std::env::temp_dir())?;
    let path = folder.path().join("conv.onnx");
    models::write(&models::conv(1), &path)?;
    let broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "32MiB")]))?;
    let mut sidecar = Sidecar::start(&broker, &SidecarOptions::new("conv", &path, 1000))?;
    sidecar.wait_ready()?;
    let dims = [1, 3, IMAGE_SIDE, IMAGE_SIDE];
    let mut random = Random::new(7);
    let pixels: Vec<f32> = (0..dims.iter().product()).map(|_| random.signed()).collect();
    let tensor = Tensor::f32("x", &dims, &pixels);
    let plain = PlainSession::open(&cache::runtime()?, &path, false)?;
    let shape = Shape::new(dims).map_err(|e| Trouble::new(e.to_string()))?;
    let in_process = || plain.run(&[Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(&tensor.data) }]);
    let expected = in_process()?.remove(0).1;

    let runtime = service::runtime()?;
    let client = runtime.block_on(async {
        let client = service::start(&broker, "conv-client", &path)?;
        service::ready(&client).await?;
        Ok::<_, Trouble>(client)
    })?;
    let direct = service::request(DType::F32, &dims, Bytes::from(tensor.data.clone()))?;
    let over_http = Request::new("conv", std::slice::from_ref(&tensor))?;
    let mut http = sidecar.client(PATIENCE);

    let (mut alone, mut by_client, mut by_http) = (Vec::new(), Vec::new(), Vec::new());
    let (mut queued, mut ran) = (Vec::new(), Vec::new());
    for block in 0..(WARM_UP + ROUNDS) / BLOCK {
        for _ in 0..BLOCK {
            let start = Instant::now();
            let output = in_process()?;
            alone.push(start.elapsed());
            figures.check(output[0].1 == expected);
        }
        for _ in 0..BLOCK {
            let start = Instant::now();
            let answer = runtime.block_on(service::infer(&client, &direct))?;
            by_client.push(start.elapsed());
            queued.push(answer.timing.queued);
            ran.push(answer.timing.ran);
            figures.check(answer.outputs[0].data[..] == expected[..]);
        }
        for _ in 0..BLOCK {
            let start = Instant::now();
            let outcome = over_http.send(&mut http)?;
            by_http.push(start.elapsed());
            figures.check(is(&outcome, &expected));
        }
        if block < WARM_UP / BLOCK {
            for times in [&mut alone, &mut by_client, &mut by_http, &mut queued, &mut ran] {
                times.clear();
            }
        }
    }
    println!("                          p50 ms   p98 ms   added p50   added p98");
    let (alone50, alone98) = (p50(&mut alone), p98(&mut alone));
    println!("  in-process session    {alone50:8.3} {alone98:8.3}");
    for (name, times) in [("client", &mut by_client), ("http", &mut by_http)] {
        let (at50, at98) = (p50(times), p98(times));
        let label = if name == "client" { "Rust client + broker" } else { "HTTP sidecar + broker" };
        println!("  {label:21} {at50:8.3} {at98:8.3} {:11.3} {:11.3}", at50 - alone50, at98 - alone98);
        figures.set(&format!("added_{name}_p50_ms"), at50 - alone50);
        figures.set(&format!("added_{name}_p98_ms"), at98 - alone98);
    }
    let (queued, ran) = (p50(&mut queued), p50(&mut ran));
    println!("  of the client's: from frame to lane {queued:.3}, on the lane {ran:.3}");
    for in_flight in [1, 4, 16] {
        let rate = throughput(figures, sidecar.address(), &over_http, &expected, in_flight)?;
        println!("  {in_flight:2} in flight over HTTP: {rate:7.0} requests/s");
        figures.set(&format!("http_{in_flight}_in_flight_per_s"), rate);
    }
    Ok(())
}

fn is(outcome: &Outcome, expected: &[u8]) -> bool {
    match outcome {
        Outcome::Answered(answer) => answer.outputs[0].data == expected,
        Outcome::Refused(..) => false,
    }
}

/// Requests per second from so many clients, each with a connection of its own.
fn throughput(
    figures: &mut Figures,
    server: SocketAddr,
    request: &Request,
    expected: &[u8],
    in_flight: usize,
) -> Result<f64> {
    let start = Instant::now();
    let one = || -> Result<(u64, u64)> {
        let mut client = Client::new(server, PATIENCE);
        let (mut right, mut wrong) = (0, 0);
        while start.elapsed() < LEVEL_LASTS {
            match is(&request.send(&mut client)?, expected) {
                true => right += 1,
                false => wrong += 1,
            }
        }
        Ok((right, wrong))
    };
    let counts: Vec<Result<(u64, u64)>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..in_flight).map(|_| scope.spawn(one)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|count| count.unwrap_or_else(|_| Err(Trouble::new("a client panicked")))).collect()
    });
    let took = start.elapsed().as_secs_f64();
    let mut all = 0.0;
    for count in counts {
        let (right, wrong) = count?;
        (0..right).for_each(|_| figures.check(true));
        (0..wrong).for_each(|_| figures.check(false));
        all += f64::from(u32::try_from(right).unwrap_or(u32::MAX));
    }
    Ok(all / took)
}
