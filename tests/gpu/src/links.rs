//! The GPUs' links as they are measured, and the GPUs as NVML sees them.

use std::{fs, path::Path};

use faaswap_device::{
    cuda::{self, CudaConfig, CudaDevice},
    nvml::{LOOK_EVERY_MIN, Watch},
};
use faaswap_protocol::Bytes;
use serde_json::{Value, json};

use crate::Result;

/// Writes `links.json` and prints it in short.
pub(crate) fn run(out: &Path) -> Result<()> {
    let ordinals: Vec<u32> = (0..u32::try_from(cuda::count()?)?).collect();
    let open = |ordinal: &u32| {
        let memory = Some(Bytes::mib(64));
        CudaDevice::open(&CudaConfig { memory, lanes: 1, ..CudaConfig::new(format!("cuda{ordinal}"), *ordinal) })
    };
    // As in a broker: the contexts are there already.
    let _devices = ordinals.iter().map(open).collect::<std::result::Result<Vec<_>, _>>()?;
    let map = cuda::measure_links(&ordinals)?;
    let gbps = |rate: &Option<faaswap_device::links::Rate>| rate.map(|rate| rate.0 / 1e9);
    for (a, gpu) in map.gpus.iter().enumerate() {
        let crowded = gbps(&map.crowded[a]).map_or(String::new(), |rate| format!(", {rate:.1} while all copy"));
        println!("{gpu}: {:.1} GB/s from host memory{crowded}", gbps(&map.alone[a]).unwrap_or(f64::NAN));
        for b in (0..map.gpus.len()).filter(|b| *b != a) {
            let together = gbps(&map.together[a][b]).unwrap_or(f64::NAN);
            let (peer, direct) = map.peers[a][b].map_or((f64::NAN, false), |peer| (peer.rate.0 / 1e9, peer.direct));
            let other = map.gpus[b];
            println!(
                "  beside {other}: {together:.1} GB/s; to it: {peer:.1} GB/s{}",
                if direct { ", direct" } else { "" }
            );
        }
    }
    println!("links in each other's way: {:?}", map.groups());
    let watch = Watch::start(LOOK_EVERY_MIN);
    let seen: Vec<Value> = watch
        .iter()
        .flat_map(|watch| watch.latest().to_vec())
        .map(|seen| {
            println!("{seen:?}");
            json!(format!("{seen:?}"))
        })
        .collect();
    let pairs: Vec<Value> = watch
        .iter()
        .flat_map(|watch| watch.pairs().to_vec())
        .map(|pair| {
            println!("{pair:?}");
            json!(format!("{pair:?}"))
        })
        .collect();
    let table = |rows: &[Vec<Option<faaswap_device::links::Rate>>]| -> Value {
        rows.iter().map(|row| row.iter().map(gbps).collect::<Vec<_>>()).collect::<Vec<_>>().into()
    };
    let peers: Vec<Vec<Value>> = map
        .peers
        .iter()
        .map(|row| {
            row.iter()
                .map(|peer| match peer {
                    Some(peer) => json!({"gbps": peer.rate.0 / 1e9, "direct": peer.direct}),
                    None => Value::Null,
                })
                .collect()
        })
        .collect();
    let gpus: Vec<_> = map.gpus.iter().map(ToString::to_string).collect();
    let alone: Vec<_> = map.alone.iter().map(gbps).collect();
    let crowded: Vec<_> = map.crowded.iter().map(gbps).collect();
    let text = serde_json::to_vec_pretty(&json!({
        "gpus": gpus, "alone_gbps": alone, "crowded_gbps": crowded, "together_gbps": table(&map.together), "peers": peers,
        "groups": map.groups(), "seen": seen, "pairs": pairs,
    }))?;
    Ok(fs::write(out.join("links.json"), text)?)
}
