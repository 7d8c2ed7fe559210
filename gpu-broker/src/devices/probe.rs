//! Measures the GPUs' links in a process of its own, which gives all of them back when it ends: a broker whose GPUs are in workers
//! has none itself.

use std::{
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    DeviceError,
    cuda::measure_links,
    links::{LinkMap, PeerLink, Rate},
};
use serde::{Deserialize, Serialize};

/// How long it may take; it takes two seconds.
const WITHIN: Duration = Duration::from_secs(30);
/// How often it is looked whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Longest answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// [`LinkMap`], as it travels.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Links {
    gpus: Vec<String>,
    alone: Vec<Option<f64>>,
    together: Vec<Vec<Option<f64>>>,
    crowded: Vec<Option<f64>>,
    peers: Vec<Vec<Option<(f64, bool)>>>,
}

impl From<LinkMap> for Links {
    fn from(map: LinkMap) -> Self {
        let rates = |rates: Vec<Option<Rate>>| rates.into_iter().map(|rate| rate.map(|rate| rate.0)).collect();
        let peer = |link: PeerLink| (link.rate.0, link.direct);
        Self {
            gpus: map.gpus.iter().map(ToString::to_string).collect(),
            alone: rates(map.alone),
            together: map.together.into_iter().map(rates).collect(),
            crowded: rates(map.crowded),
            peers: map.peers.into_iter().map(|to| to.into_iter().map(|link| link.map(peer)).collect()).collect(),
        }
    }
}

impl TryFrom<Links> for LinkMap {
    type Error = io::Error;

    fn try_from(links: Links) -> io::Result<Self> {
        let rates = |rates: Vec<Option<f64>>| rates.into_iter().map(|rate| rate.map(Rate)).collect();
        let peer = |(rate, direct)| PeerLink { rate: Rate(rate), direct };
        let gpus = links.gpus.iter().map(|gpu| gpu.parse()).collect::<Result<_, _>>().map_err(io::Error::other)?;
        Ok(Self {
            gpus,
            alone: rates(links.alone),
            together: links.together.into_iter().map(rates).collect(),
            crowded: rates(links.crowded),
            peers: links.peers.into_iter().map(|to| to.into_iter().map(|link| link.map(peer)).collect()).collect(),
        })
    }
}

/// What the process does: measures, and writes what it found to its standard output.
pub(crate) fn child(ordinals: &[u32]) -> Result<(), String> {
    let map = measure_links(ordinals).map_err(|error| error.to_string())?;
    serde_json::to_writer(io::stdout(), &Links::from(map)).map_err(|error| error.to_string())
}

/// The links of these GPUs.
pub(super) fn measure(program: &Path, ordinals: &[u32]) -> Result<LinkMap, DeviceError> {
    let failed = |error: io::Error| DeviceError::Failed { call: "measuring links", reason: error.to_string() };
    try_measure(program, ordinals).map_err(failed)
}

fn try_measure(program: &Path, ordinals: &[u32]) -> io::Result<LinkMap> {
    let mut child = Command::new(program)
        .arg("probe-links")
        .args(ordinals.iter().map(ToString::to_string))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let answer = child.stdout.take();
    let until = Instant::now() + WITHIN;
    // What it says fits in a pipe.
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < until => thread::sleep(LOOK_EVERY),
            None => {
                child.kill()?;
                break child.wait()?;
            }
        }
    };
    if !status.success() {
        return Err(io::Error::other(format!("its process ended with {status}")));
    }
    let mut text = String::new();
    answer.ok_or_else(|| io::Error::other("no answer"))?.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    serde_json::from_str::<Links>(&text)?.try_into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_map_comes_back_as_it_was_sent() {
        let gpus = vec!["0000:06:00.0".parse().unwrap(), "0000:07:00.0".parse().unwrap()];
        let mut map = LinkMap::blank(gpus);
        (map.alone[0], map.crowded[1], map.together[0][1]) = (Some(Rate(5.5e10)), Some(Rate(3e10)), Some(Rate(5e10)));
        map.peers[1][0] = Some(PeerLink { rate: Rate(3.7e11), direct: true });
        let text = serde_json::to_string(&Links::from(map.clone())).unwrap();
        assert_eq!(LinkMap::try_from(serde_json::from_str::<Links>(&text).unwrap()).unwrap(), map);
        let wrong = Links { gpus: vec!["nowhere".to_owned()], ..Links::from(map) };
        assert!(LinkMap::try_from(wrong).is_err());
    }
}
