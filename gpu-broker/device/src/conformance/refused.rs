//! What a device refuses, and that it is whole afterwards.

use std::sync::Arc;

use faaswap_protocol::Bytes;

use super::{Harness, Model, ask_in, assert_holds, bring, chunks, end, is_state_error, reserve, take};
use crate::{DeviceError, Group, RangeId, Stream};

pub(super) fn while_in(harness: &Harness<'_>) {
    let device = &*(harness.make)(2);
    let model = Model::new(1, chunks(device, 1), 2);
    let range = reserve(device, &model);
    let swap_in = || {
        let (weights, groups) = (Arc::clone(&model.weights), Arc::clone(&model.groups));
        device.swap_in(range, weights, groups, Box::new(|_| panic!("a refused swap does not end")))
    };
    let came = ask_in(device, range, &model);
    is_state_error(&swap_in());
    is_state_error(&device.release(range));
    end(&came).expect("the swap-in succeeds");
    is_state_error(&swap_in());
    is_state_error(&device.release(range));
    assert_holds(device, range, &model);
    take(device, range);
    device.release(range).expect("the range is out");
}

pub(super) fn while_out(harness: &Harness<'_>) {
    let device = &*(harness.make)(2);
    let model = Model::new(1, chunks(device, 1), 2);
    let range = reserve(device, &model);
    let refused = || {
        is_state_error(&device.await_group(range, 0, Stream::CALLER));
        is_state_error(&device.read_back(range, 0, &mut [0]));
        is_state_error(&device.swap_out(range, Box::new(|_| panic!("a refused swap does not end"))));
    };
    refused();
    bring(device, range, &model);
    let end_of_weights = model.size().get();
    for (offset, len) in [(end_of_weights, 1), (u64::MAX, 1), (0, model.weights.len() + 1)] {
        let beyond = device.read_back(range, offset, &mut vec![0; len]);
        assert!(matches!(beyond, Err(DeviceError::Invalid(_))), "{offset} {len}: {beyond:?}");
    }
    let no_group = device.await_group(range, 2, Stream::CALLER);
    assert!(matches!(no_group, Err(DeviceError::Invalid(_))), "{no_group:?}");
    take(device, range);
    refused();
}

pub(super) fn bad_groups(harness: &Harness<'_>) {
    let device = &*(harness.make)(1);
    let model = Model::new(1, 1000, 1);
    let range = reserve(device, &model);
    let group = |offset, len| Group { offset, len };
    let bad: [&[Group]; 8] = [
        &[],
        &[group(0, 999)],
        &[group(0, 1001)],
        &[group(1, 999)],
        &[group(0, 400), group(500, 500)],
        &[group(0, 600), group(500, 500)],
        &[group(500, 500), group(0, 500)],
        &[group(0, 1000), group(1000, u64::MAX)],
    ];
    for groups in bad {
        let never = Box::new(|_| panic!("a refused swap does not end"));
        let refused = device.swap_in(range, Arc::clone(&model.weights), groups.into(), never);
        assert!(matches!(refused, Err(DeviceError::Invalid(_))), "{groups:?}: {refused:?}");
    }
    let other = Model::new(1, 999, 1);
    let never = Box::new(|_| panic!("a refused swap does not end"));
    let refused = device.swap_in(range, Arc::clone(&other.weights), Arc::clone(&other.groups), never);
    assert!(matches!(refused, Err(DeviceError::Invalid(_))), "weights of another size: {refused:?}");
    bring(device, range, &model);
    assert_holds(device, range, &model);
}

pub(super) fn never_fits(harness: &Harness<'_>) {
    let device = &*(harness.make)(2);
    let refused = device.reserve(Bytes::new(chunks(device, 2) + 1));
    let (needed, free) = (Bytes::new(chunks(device, 3)), Bytes::new(chunks(device, 2)));
    assert_eq!(refused, Err(DeviceError::OutOfMemory { needed, free }));
    assert!(device.reserve(Bytes::new(u64::MAX)).is_err());
    assert!(device.reserve(Bytes::new(chunks(device, 2))).is_ok());
}

pub(super) fn released_range(harness: &Harness<'_>) {
    let device = &*(harness.make)(2);
    let model = Model::new(1, chunks(device, 1), 1);
    let range = reserve(device, &model);
    device.release(range).expect("the range is out");
    let again = reserve(device, &model);
    bring(device, again, &model);
    is_state_error(&device.address(range));
    is_state_error(&device.release(range));
    is_state_error(&device.await_group(range, 0, Stream::CALLER));
    is_state_error(&device.read_back(range, 0, &mut [0]));
    is_state_error(&device.address(RangeId(u32::MAX)));
    assert_holds(device, again, &model);
}
