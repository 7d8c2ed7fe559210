//! Measures links: each from host memory alone, each two of them together, and copies between GPUs.
//!
//! Short, since it is done at every start: 64 MiB a copy, a few copies a measurement. It uses memory of its own and
//! streams of its own, but the links are everyone's: whatever else copies meanwhile makes them look slower.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    driver::{Context, can_reach},
    host_memory::Pinned,
    peer::{Access, Plain},
    queue::{Event, Queue},
};
use crate::{
    DeviceError,
    links::{LinkMap, PeerLink, Rate},
};

/// Size of a copy: long enough that beginning it does not count.
const COPY_BYTES: usize = 64 << 20;
/// Copies of one measurement, after one that is not timed.
const COPIES: u32 = 3;
/// What is not measured by then is left out.
pub const PROBE_WITHIN: Duration = Duration::from_millis(900);

/// One end of links.
struct End {
    context: Arc<Context>,
    queue: Queue,
    memory: Plain,
    start: Event,
    end: Event,
}

impl End {
    fn open(ordinal: u32) -> Result<Self, DeviceError> {
        let ordinal = i32::try_from(ordinal).map_err(|_| DeviceError::Invalid("there is no such GPU"))?;
        let context = Context::open(ordinal)?;
        Ok(Self {
            queue: Queue::new(&context)?,
            memory: Plain::new(&context, COPY_BYTES)?,
            start: Event::timed(&context)?,
            end: Event::timed(&context)?,
            context,
        })
    }

    /// Queues the copies of one measurement.
    fn begin(&self, copy: impl Fn() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        self.context.enter()?;
        copy()?;
        self.queue.record(&self.start)?;
        (0..COPIES).try_for_each(|_| copy())?;
        self.queue.record(&self.end)
    }

    fn begin_from_host(&self, host: &Pinned) -> Result<(), DeviceError> {
        // SAFETY: the pinned memory has this length and nobody writes it; both it and the device's outlive the wait in
        // `settle`, which every measurement ends with, however it went.
        self.begin(|| unsafe { self.queue.copy_in(self.memory.address(), host.as_ptr(), COPY_BYTES) })
    }

    /// Waits for the copies; returns their speed.
    fn finish(&self) -> Result<Rate, DeviceError> {
        self.end.wait()?;
        Ok(rate(self.end.since(&self.start)?))
    }

    /// Waits for whatever is queued.
    fn settle(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        self.queue.finish(&Event::new(&self.context)?)
    }
}

fn rate(took: Duration) -> Rate {
    let bytes = f64::from(COPIES) * COPY_BYTES as f64;
    Rate(bytes / took.max(Duration::from_nanos(1)).as_secs_f64())
}

/// Measures the links of these GPUs, by the driver's count. Takes less than a second where their contexts exist already;
/// call it while their devices are open and nothing is being swapped.
pub fn measure_links(ordinals: &[u32]) -> Result<LinkMap, DeviceError> {
    let ends = ordinals.iter().map(|ordinal| End::open(*ordinal)).collect::<Result<Vec<_>, _>>()?;
    let gpus = ends.iter().map(|end| end.context.pci_address()).collect::<Result<_, _>>()?;
    let mut map = LinkMap::blank(gpus);
    let Some(first) = ends.first() else { return Ok(map) };
    let host = Pinned::new(&first.context, COPY_BYTES)?;
    let measured = measure(&ends, &host, &mut map);
    // Nothing may be under way when the memory goes, also after a failure.
    let settled = ends.iter().map(End::settle).collect::<Result<Vec<_>, _>>();
    if let Err(error) = settled {
        // The driver still reads it: memory that stays is better than memory that is another's.
        std::mem::forget((host, ends));
        return Err(error);
    }
    measured.map(|()| map)
}

/// Host links first, since every swap uses them; then pairs, then all, then GPU to GPU.
fn measure(ends: &[End], host: &Pinned, map: &mut LinkMap) -> Result<(), DeviceError> {
    let until = Instant::now() + PROBE_WITHIN;
    let in_time = || Instant::now() < until;
    for (a, end) in ends.iter().enumerate().take_while(|_| in_time()) {
        map.alone[a] = kept(
            "a host link",
            (|| {
                end.begin_from_host(host)?;
                end.finish()
            })(),
        )?;
    }
    for (a, b) in pairs(ends.len()).filter(|(a, b)| a < b).take_while(|_| in_time()) {
        let both = kept("two host links", two_at_once(&ends[a], &ends[b], host))?;
        (map.together[a][b], map.together[b][a]) = both.unzip();
    }
    if ends.len() > 2 && in_time() {
        let all = kept("all host links", all_at_once(ends, host))?;
        map.crowded = all.map_or(vec![None; ends.len()], |rates| rates.into_iter().map(Some).collect());
    }
    for (from, to) in pairs(ends.len()).take_while(|_| in_time()) {
        map.peers[from][to] = kept("a link between GPUs", between(&ends[from], &ends[to]))?;
    }
    if !in_time() {
        tracing::warn!(within = ?PROBE_WITHIN, "not all links were measured");
    }
    Ok(())
}

/// All ordered pairs of different numbers.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(move |a| (0..n).map(move |b| (a, b))).filter(|(a, b)| a != b)
}

/// What fails is left out, with a line; a lost device ends it all.
fn kept<T>(what: &'static str, measured: Result<T, DeviceError>) -> Result<Option<T>, DeviceError> {
    match measured {
        Ok(value) => Ok(Some(value)),
        Err(DeviceError::Lost) => Err(DeviceError::Lost),
        Err(
            error @ (DeviceError::OutOfMemory { .. }
            | DeviceError::Failed { .. }
            | DeviceError::State { .. }
            | DeviceError::Invalid(_)),
        ) => {
            tracing::warn!(what, %error, "a link is not measured");
            Ok(None)
        }
    }
}

fn two_at_once(a: &End, b: &End, host: &Pinned) -> Result<(Rate, Rate), DeviceError> {
    a.begin_from_host(host)?;
    b.begin_from_host(host)?;
    let (one, other) = (a.finish(), b.finish());
    Ok((one?, other?))
}

fn all_at_once(ends: &[End], host: &Pinned) -> Result<Vec<Rate>, DeviceError> {
    ends.iter().try_for_each(|end| end.begin_from_host(host))?;
    // Each is waited for, also where one has failed.
    let all: Vec<_> = ends.iter().map(End::finish).collect();
    all.into_iter().collect()
}

fn between(from: &End, to: &End) -> Result<PeerLink, DeviceError> {
    let (forth, back) =
        (can_reach(to.context.device, from.context.device)?, can_reach(from.context.device, to.context.device)?);
    let direct = forth && back;
    let access = || Ok((Access::new(&to.context, &from.context)?, Access::new(&from.context, &to.context)?));
    let _access = if direct { Some(access()?) } else { None };
    let begun = to.begin(|| from.memory.copy_to(&to.memory, &to.queue));
    let rate = begun.and_then(|()| to.finish());
    // Access may not go while copies use it.
    to.settle()?;
    Ok(PeerLink { rate: rate?, direct })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_measured_both_ways_and_none_with_itself() {
        assert_eq!(pairs(3).collect::<Vec<_>>(), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]);
        assert_eq!(pairs(1).count() + pairs(0).count(), 0);
    }

    #[test]
    fn a_rate_is_what_was_copied_over_its_time() {
        let bytes = f64::from(COPIES) * COPY_BYTES as f64;
        assert!((rate(Duration::from_secs(2)).0 - bytes / 2.0).abs() < 1.0);
        assert!(rate(Duration::ZERO).0.is_finite(), "a clock that stands still");
    }

    #[test]
    fn one_link_that_fails_is_left_out_and_a_lost_device_ends_the_probe() {
        assert_eq!(kept::<u8>("a link", Err(DeviceError::Invalid("no"))), Ok(None));
        assert_eq!(kept("a link", Ok(1)), Ok(Some(1)));
        assert_eq!(kept::<u8>("a link", Err(DeviceError::Lost)), Err(DeviceError::Lost));
    }

    #[test]
    fn where_there_is_no_driver_the_probe_says_so() {
        if super::super::count().is_err() {
            let refused = measure_links(&[0]);
            assert!(matches!(refused, Err(DeviceError::Failed { .. })), "{refused:?}");
        }
        assert_eq!(measure_links(&[]), Ok(LinkMap::default()), "no GPUs, no links");
    }
}
