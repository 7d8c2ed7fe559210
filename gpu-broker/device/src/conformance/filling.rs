//! Swapping in weights that are still on their way to host memory.

use std::{sync::Arc, thread};

use faaswap_protocol::Bytes;

use super::{Harness, Model, ask_in, assert_holds, chunks, end, is_state_error, mapped_chunks, reserve, take};
use crate::{Device, DeviceError, Filler, HostWeights, RangeId, Stream};

const GROUPS: u32 = 8;

/// A model of four chunks of which nothing is in host memory yet, and its bytes.
fn to_come(device: &dyn Device, seed: u64) -> (Model, Filler, Vec<u8>) {
    let whole = Model::new(seed, chunks(device, 4) - 100, u64::from(GROUPS));
    let bytes = whole.weights.as_slice().to_vec();
    let (weights, filler) = HostWeights::to_come(Bytes::of_len(bytes.len())).expect("host memory is there");
    (Model { weights, groups: whole.groups }, filler, bytes)
}

/// Where a group ends in the weights.
fn end_of(model: &Model, group: u32) -> usize {
    let group = model.groups[usize::try_from(group).expect("few groups")];
    usize::try_from(group.offset + group.len).expect("test weights are small")
}

pub(super) fn groups_come_as_they_are_filled(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    for round in 0..3 {
        let (model, mut filler, bytes) = to_come(device, round);
        let range = reserve(device, &model);
        let address = device.address(range).expect("the range is reserved");
        let came = ask_in(device, range, &model);
        let mut filled = 0;
        for group in 0..GROUPS {
            let until = end_of(&model, group);
            // In two steps, so that a device that does not wait for all of a group is seen.
            for part in [(filled + until) / 2, until] {
                assert!(came.try_recv().is_err(), "the swap-in ended with group {group} not filled");
                filler.append(&bytes[filled..part]).expect("there is room");
                filled = part;
            }
            // A CUDA device knows its groups only once all copies are queued; see the trait.
            if device.as_cuda().is_none() {
                device.await_group(range, group, Stream::CALLER).expect("the group comes");
                let mut seen = vec![0; until];
                (harness.peek)(address, &mut seen);
                assert!(seen == bytes[..until], "group {group} was not there");
            }
        }
        end(&came).expect("the swap-in succeeds");
        device.await_group(range, GROUPS - 1, Stream::CALLER).expect("the last group comes");
        assert_holds(device, range, &model);
        take(device, range);
        device.release(range).expect("the range is out");
    }
}

pub(super) fn failed_filling(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    for stop_after in [0, 3] {
        let (model, mut filler, bytes) = to_come(device, 1);
        let range = reserve(device, &model);
        let came = ask_in(device, range, &model);
        let until = if stop_after == 0 { 0 } else { end_of(&model, stop_after - 1) };
        filler.append(&bytes[..until]).expect("there is room");
        let why = DeviceError::Failed { call: "reading weights", reason: "the disk is gone".to_owned() };
        thread::scope(|scope| {
            let waiting: Vec<_> = (stop_after..GROUPS)
                .map(|group| scope.spawn(move || device.await_group(range, group, Stream::CALLER)))
                .collect();
            filler.fail(why.clone());
            for waiting in waiting {
                let outcome = waiting.join().expect("awaiting does not panic");
                assert_eq!(outcome, Err(why.clone()));
            }
        });
        assert_eq!(end(&came).map(|report| report.copied), Err(why));
        is_out(device, range);
        // The device is as good as before, and the same range takes the same weights once they are there.
        let whole = Model { weights: full(&bytes), groups: Arc::clone(&model.groups) };
        end(&ask_in(device, range, &whole)).expect("the swap-in succeeds");
        assert_holds(device, range, &whole);
        take(device, range);
        device.release(range).expect("the range is out");
    }
}

fn full(bytes: &[u8]) -> Arc<HostWeights> {
    Arc::new(HostWeights::from_bytes(bytes).expect("host memory is there"))
}

fn is_out(device: &dyn Device, range: RangeId) {
    assert_eq!(mapped_chunks(device), 0, "nothing is left behind the range");
    is_state_error(&device.read_back(range, 0, &mut [0]));
    is_state_error(&device.swap_out(range, Box::new(|_| panic!("a refused swap does not end"))));
}

pub(super) fn out_behind_filling(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    let (model, mut filler, bytes) = to_come(device, 5);
    let range = reserve(device, &model);
    let came = ask_in(device, range, &model);
    let left = super::ask_out(device, range);
    filler.append(&bytes).expect("there is room");
    end(&came).expect("the swap-in is done before the swap-out");
    end(&left).expect("the swap-out succeeds");
    assert_eq!(mapped_chunks(device), 0);
}
