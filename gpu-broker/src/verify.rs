//! Reads weights back from devices now and then, and compares them with what was sent.
//!
//! Wrong outputs are the worst failure, since nobody notices. A sample of the swap-ins is looked at, one at a time, on a
//! thread of its own; what is swapped out before its turn is let go. A device with other weights than it was sent is not
//! to be trusted with anything: it is given up.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use faaswap_device::{Device, DeviceError, HostWeights, RangeId};

/// Weights that wait to be looked at; with more the sample is smaller.
const WAITING_MAX: usize = 1;

/// One stay of a model's weights on a device.
#[derive(Debug)]
pub(crate) struct Stay {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) range: RangeId,
    pub(crate) weights: Arc<HostWeights>,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Byte for byte what was sent.
    Same,
    /// Not what was sent, from this byte's piece on.
    Damaged { at: u64 },
    /// Not there any more.
    Gone,
}

/// What the verifier has seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) same: AtomicU64,
    pub(crate) damaged: AtomicU64,
}

/// The thread, and which swap-ins it looks at.
#[derive(Debug)]
pub(crate) struct Verifier {
    stays: SyncSender<Stay>,
    /// One in so many; 0 for none.
    every: u64,
    count: AtomicU64,
    pub(crate) seen: Arc<Seen>,
}

impl Verifier {
    pub(crate) fn start(every: u64) -> io::Result<Arc<Self>> {
        let (stays, queue) = sync_channel(WAITING_MAX);
        let seen = Arc::new(Seen::default());
        let theirs = Arc::clone(&seen);
        thread::Builder::new().name("verify".to_owned()).spawn(move || run(&queue, &theirs))?;
        Ok(Arc::new(Self { stays, every, count: AtomicU64::new(0), seen }))
    }

    /// Whether the next swap-in is one of the sample.
    pub(crate) fn wants_next(&self) -> bool {
        self.every > 0 && (self.count.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(self.every)
    }

    /// Looks at weights that have just arrived, unless it is busy.
    pub(crate) fn look_at(&self, stay: Stay) {
        // A sample may be smaller than wished for.
        let _ = self.stays.try_send(stay);
    }
}

fn run(queue: &Receiver<Stay>, seen: &Seen) {
    for stay in queue {
        match verdict(&stay) {
            Verdict::Same => drop(seen.same.fetch_add(1, Ordering::Relaxed)),
            Verdict::Gone => {}
            Verdict::Damaged { at } => {
                seen.damaged.fetch_add(1, Ordering::Relaxed);
                let name = &stay.device.info().name;
                tracing::error!(device = %name, at, "weights on the device are not what was sent: it is given up");
                stay.device.fail();
            }
        }
    }
}

fn verdict(stay: &Stay) -> Verdict {
    match stay.device.differs_at(stay.range, &stay.weights) {
        Ok(None) => Verdict::Same,
        Ok(Some(at)) => Verdict::Damaged { at },
        Err(
            DeviceError::State { .. }
            | DeviceError::Lost
            | DeviceError::Invalid(_)
            | DeviceError::Failed { .. }
            | DeviceError::OutOfMemory { .. },
        ) => Verdict::Gone,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::mpsc;

    use faaswap_device::{
        COMPARED_AT_A_TIME as PIECE, Group,
        host::{HostConfig, HostDevice},
    };
    use faaswap_protocol::Bytes;

    use super::*;

    const LEN: usize = 3 * PIECE + 17;

    fn weights(last: u8) -> Arc<HostWeights> {
        let mut bytes = vec![7; LEN];
        bytes[LEN - 1] = last;
        Arc::new(HostWeights::from_bytes(&bytes).unwrap())
    }

    fn resident(sent: &Arc<HostWeights>) -> Stay {
        let device: Arc<dyn Device> = HostDevice::new(HostConfig::new("host0", Bytes::mib(8))).unwrap();
        let range = device.reserve(sent.size()).unwrap();
        let groups = Arc::from([Group { offset: 0, len: LEN as u64 }]);
        let (tell, done) = mpsc::channel();
        device.swap_in(range, Arc::clone(sent), groups, Box::new(move |end| tell.send(end).unwrap())).unwrap();
        done.recv().unwrap().unwrap();
        Stay { device, range, weights: Arc::clone(sent) }
    }

    #[test]
    fn weights_that_arrived_whole_are_the_same_and_those_that_left_are_gone() {
        let stay = resident(&weights(1));
        assert_eq!(verdict(&stay), Verdict::Same);
        let (tell, done) = mpsc::channel();
        stay.device.swap_out(stay.range, Box::new(move |end| tell.send(end).unwrap())).unwrap();
        done.recv().unwrap().unwrap();
        assert_eq!(verdict(&stay), Verdict::Gone);
    }

    #[test]
    fn a_device_with_one_other_byte_is_given_up() {
        let stay = Stay { weights: weights(2), ..resident(&weights(1)) };
        assert_eq!(verdict(&stay), Verdict::Damaged { at: 3 * PIECE as u64 });
        let (stays, queue) = sync_channel(1);
        let (device, seen) = (Arc::clone(&stay.device), Seen::default());
        stays.send(stay).unwrap();
        drop(stays);
        run(&queue, &seen);
        assert!(device.is_lost());
        assert_eq!((seen.same.into_inner(), seen.damaged.into_inner()), (0, 1));
    }

    #[test]
    fn one_swap_in_of_so_many_is_looked_at_and_none_where_that_is_off() {
        let wanted = |every| {
            let verifier = Verifier::start(every).unwrap();
            (0..9).filter(|_| verifier.wants_next()).count()
        };
        assert_eq!([wanted(0), wanted(1), wanted(3), wanted(100)], [0, 9, 3, 0]);
    }
}
