//! What every device must do, as cases that each implementation's tests run.
//!
//! A case is given a [`Harness`] and panics where the device breaks its promise. Nothing here knows how a device does
//! it, nor how fast.

mod filling;
mod refused;
mod registered;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
};

use faaswap_protocol::Bytes;

use crate::{Device, DeviceError, Group, HostWeights, RangeId, Stream, SwapReport};

/// How the cases get at an implementation.
#[derive(Clone, Copy)]
pub struct Harness<'a> {
    /// Makes a device with memory for exactly so many chunks.
    pub make: &'a dyn Fn(u64) -> Arc<dyn Device>,
    /// Reads device memory at an address of a range whose group has arrived.
    pub peek: &'a dyn Fn(usize, &mut [u8]),
}

impl fmt::Debug for Harness<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").finish_non_exhaustive()
    }
}

/// A case and its name.
pub type Case = (&'static str, fn(&Harness<'_>));

/// All cases.
pub const CASES: &[Case] = &[
    ("weights_are_the_same_after_every_swap_and_at_the_same_address", same_after_every_swap),
    ("weights_survive_in_scattered_chunks", scattered_chunks),
    ("each_group_is_there_when_its_wait_ends", each_group_is_there),
    ("many_may_await_the_same_group", many_awaiters),
    ("memory_is_counted_exactly_and_never_exceeds_the_capacity", counted_exactly),
    ("a_full_device_fails_the_swap_and_is_whole_afterwards", full_device),
    ("awaiting_a_swap_that_fails_ends_with_its_reason", failed_swap_wakes),
    ("a_swap_in_may_use_the_memory_of_the_swap_out_before_it", queue_order),
    ("a_swap_out_may_be_asked_for_while_the_swap_in_runs", out_behind_in),
    ("a_range_that_is_not_out_cannot_be_released_or_swapped_in", refused::while_in),
    ("a_range_that_is_out_cannot_be_awaited_read_or_swapped_out", refused::while_out),
    ("weights_of_no_bytes_can_be_swapped", no_bytes),
    ("groups_that_do_not_cover_the_weights_are_refused", refused::bad_groups),
    ("weights_that_can_never_fit_are_refused_when_reserving", refused::never_fits),
    ("a_released_range_is_gone", refused::released_range),
    ("many_threads_may_swap_at_once", many_threads),
    ("weights_that_are_still_being_filled_come_group_by_group", filling::groups_come_as_they_are_filled),
    ("weights_whose_filling_fails_leave_the_range_out", filling::failed_filling),
    ("a_swap_out_may_wait_behind_weights_that_are_being_filled", filling::out_behind_filling),
    ("inputs_in_registered_memory_are_read_there", registered::read_in_place),
    ("inputs_that_cannot_be_read_in_place_are_said_to_be_so", registered::not_in_place),
    ("registered_memory_is_given_back_before_its_owner_goes", registered::given_back),
];

/// Runs all cases, naming each before it runs.
pub fn run_all(harness: &Harness<'_>) {
    for (name, case) in CASES {
        eprintln!("conformance: {name}");
        case(harness);
    }
}

/// One model: weights with a pattern of their own, in groups.
struct Model {
    weights: Arc<HostWeights>,
    groups: Arc<[Group]>,
}

impl Model {
    fn new(seed: u64, len: u64, groups: u64) -> Self {
        // A 64-bit mix of position and seed, so that no two models, chunks or groups look alike.
        let word =
            |i: u64| (i ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93).rotate_left(29);
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|i| word(i).to_le_bytes()).collect();
        bytes.truncate(usize::try_from(len).expect("test weights are small"));
        let at = |i: u64| len * i / groups.max(1);
        let groups = (0..groups).map(|i| Group { offset: at(i), len: at(i + 1) - at(i) }).collect();
        Self { weights: Arc::new(HostWeights::from_bytes(&bytes).expect("host memory is there")), groups }
    }

    fn size(&self) -> Bytes {
        self.weights.size()
    }
}

type Outcome<T> = Receiver<Result<T, DeviceError>>;

fn ask_in(device: &dyn Device, range: RangeId, model: &Model) -> Outcome<SwapReport> {
    let (done, outcome) = mpsc::channel();
    let done = Box::new(move |result| drop(done.send(result)));
    device.swap_in(range, Arc::clone(&model.weights), Arc::clone(&model.groups), done).expect("the swap-in is queued");
    outcome
}

fn ask_out(device: &dyn Device, range: RangeId) -> Outcome<()> {
    let (done, outcome) = mpsc::channel();
    device.swap_out(range, Box::new(move |result| drop(done.send(result)))).expect("the swap-out is queued");
    outcome
}

fn end<T>(outcome: &Outcome<T>) -> Result<T, DeviceError> {
    outcome.recv().expect("a queued swap ends with a call")
}

fn bring(device: &dyn Device, range: RangeId, model: &Model) -> SwapReport {
    end(&ask_in(device, range, model)).expect("the swap-in succeeds")
}

fn take(device: &dyn Device, range: RangeId) {
    end(&ask_out(device, range)).expect("the swap-out succeeds");
}

fn reserve(device: &dyn Device, model: &Model) -> RangeId {
    device.reserve(model.size()).expect("addresses are there")
}

fn assert_holds(device: &dyn Device, range: RangeId, model: &Model) {
    let mut bytes = vec![0; model.weights.len()];
    device.read_back(range, 0, &mut bytes).expect("a range that is swapped in can be read");
    assert!(bytes == model.weights.as_slice(), "{range:?} holds other bytes than its weights");
}

fn chunks(device: &dyn Device, n: u64) -> u64 {
    device.info().chunk.get() * n
}

fn mapped_chunks(device: &dyn Device) -> u64 {
    let memory = device.memory();
    assert!(memory.mapped <= memory.capacity, "{memory:?}");
    assert!(memory.mapped.get().is_multiple_of(device.info().chunk.get()), "{memory:?}");
    memory.mapped.get() / device.info().chunk.get()
}

fn is_state_error<T: fmt::Debug>(result: &Result<T, DeviceError>) {
    assert!(matches!(result, Err(DeviceError::State { .. })), "{result:?}");
}

fn same_after_every_swap(harness: &Harness<'_>) {
    let device = &*(harness.make)(5);
    let model = Model::new(1, chunks(device, 2) - 300, 5);
    let other = Model::new(2, chunks(device, 1), 1);
    let (range, beside) = (reserve(device, &model), reserve(device, &other));
    let address = device.address(range).expect("the range is reserved");
    for round in 0..6 {
        // What is behind the range before decides which chunks it gets next.
        if round % 2 == 1 {
            bring(device, beside, &other);
        }
        let report = bring(device, range, &model);
        assert_eq!(report.copied, model.size());
        assert!(report.mapping <= report.took, "{report:?}");
        assert_eq!(device.address(range), Ok(address));
        assert_holds(device, range, &model);
        let mut bytes = vec![0; model.weights.len()];
        (harness.peek)(address, &mut bytes);
        assert!(bytes == model.weights.as_slice(), "programs see other bytes than the weights");
        take(device, range);
        if round % 2 == 1 {
            assert_holds(device, beside, &other);
            take(device, beside);
        }
    }
}

fn scattered_chunks(harness: &Harness<'_>) {
    let device = &*(harness.make)(8);
    let small: Vec<Model> = (0..8).map(|seed| Model::new(seed, chunks(device, 1), 1)).collect();
    let ranges: Vec<RangeId> = small.iter().map(|model| reserve(device, model)).collect();
    for (range, model) in ranges.iter().zip(&small) {
        bring(device, *range, model);
    }
    for range in ranges.iter().step_by(2) {
        take(device, *range);
    }
    let large = Model::new(99, chunks(device, 4), 7);
    let range = reserve(device, &large);
    for _ in 0..2 {
        bring(device, range, &large);
        assert_holds(device, range, &large);
        for (range, model) in ranges.iter().zip(&small).skip(1).step_by(2) {
            assert_holds(device, *range, model);
        }
        take(device, range);
    }
}

fn each_group_is_there(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    // Two models take turns in the same memory, so that a group that is not there yet shows the other's bytes.
    let models = [1, 2].map(|seed| Model::new(seed, chunks(device, 4), 9));
    let ranges = [0, 1].map(|i: usize| reserve(device, &models[i]));
    for round in 0..10 {
        let (range, model) = (ranges[round % 2], &models[round % 2]);
        let address = device.address(range).expect("the range is reserved");
        let outcome = ask_in(device, range, model);
        for (group, index) in model.groups.iter().zip(0..) {
            device.await_group(range, index, Stream::CALLER).expect("the group comes");
            let stretch = |n: u64| usize::try_from(n).expect("test weights are small");
            let (offset, len) = (stretch(group.offset), stretch(group.len));
            let mut bytes = vec![0; len];
            (harness.peek)(address + offset, &mut bytes);
            assert!(bytes == model.weights.as_slice()[offset..offset + len], "group {index} was not there");
        }
        end(&outcome).expect("the swap-in succeeds");
        take(device, range);
    }
}

fn many_awaiters(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    let model = Model::new(3, chunks(device, 4), 16);
    let range = reserve(device, &model);
    for _ in 0..5 {
        let outcome = ask_in(device, range, &model);
        thread::scope(|scope| {
            for first in 0..6 {
                scope.spawn(move || {
                    for group in first..16 {
                        device.await_group(range, group, Stream::CALLER).expect("the group comes");
                    }
                });
            }
        });
        end(&outcome).expect("the swap-in succeeds");
        take(device, range);
    }
}

fn counted_exactly(harness: &Harness<'_>) {
    let device = &*(harness.make)(7);
    assert_eq!(device.memory().capacity.get(), chunks(device, 7));
    let sizes = [1, 2, 3, 1, 2];
    // Weights end inside a chunk, and the whole of it counts.
    let models: Vec<Model> = (1..).zip(sizes).map(|(seed, n)| Model::new(seed, chunks(device, n) - 100, 2)).collect();
    let ranges: Vec<RangeId> = models.iter().map(|model| reserve(device, model)).collect();
    assert_eq!(mapped_chunks(device), 0, "addresses take no memory");
    let mut resident = BTreeSet::new();
    for step in 0..60_usize {
        let i = step * 7 % 5;
        let used: u64 = resident.iter().map(|&i: &usize| sizes[i]).sum();
        if resident.remove(&i) {
            take(device, ranges[i]);
            assert_eq!(mapped_chunks(device), used - sizes[i]);
        } else if used + sizes[i] <= 7 {
            bring(device, ranges[i], &models[i]);
            resident.insert(i);
            assert_eq!(mapped_chunks(device), used + sizes[i]);
        } else {
            let refused = end(&ask_in(device, ranges[i], &models[i]));
            assert!(matches!(refused, Err(DeviceError::OutOfMemory { .. })), "{refused:?}");
            assert_eq!(mapped_chunks(device), used);
            let out = *resident.first().expect("something takes the memory");
            resident.remove(&out);
            take(device, ranges[out]);
        }
    }
}

fn full_device(harness: &Harness<'_>) {
    let device = &*(harness.make)(4);
    let (a, b) = (Model::new(1, chunks(device, 3), 3), Model::new(2, chunks(device, 2), 2));
    let (first, second) = (reserve(device, &a), reserve(device, &b));
    bring(device, first, &a);
    let refused = end(&ask_in(device, second, &b));
    let (needed, free) = (Bytes::new(chunks(device, 2)), Bytes::new(chunks(device, 1)));
    assert_eq!(refused, Err(DeviceError::OutOfMemory { needed, free }));
    assert_holds(device, first, &a);
    take(device, first);
    assert_eq!(mapped_chunks(device), 0);
    let whole = Model::new(3, chunks(device, 4), 4);
    let range = reserve(device, &whole);
    bring(device, range, &whole);
    assert_holds(device, range, &whole);
    take(device, range);
    bring(device, second, &b);
    assert_holds(device, second, &b);
}

fn failed_swap_wakes(harness: &Harness<'_>) {
    let device = &*(harness.make)(2);
    let model = Model::new(1, chunks(device, 2), 4);
    let (first, second) = (reserve(device, &model), reserve(device, &model));
    let outcomes = [ask_in(device, first, &model), ask_in(device, second, &model)];
    thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..4).map(|group| scope.spawn(move || device.await_group(second, group, Stream::CALLER))).collect();
        for waiting in waiting {
            let outcome = waiting.join().expect("awaiting does not panic");
            assert!(matches!(outcome, Err(DeviceError::OutOfMemory { .. })), "{outcome:?}");
        }
    });
    assert!(end(&outcomes[0]).is_ok() && end(&outcomes[1]).is_err());
    is_state_error(&device.read_back(second, 0, &mut [0]));
    device.release(second).expect("a range whose swap failed is out");
}

fn queue_order(harness: &Harness<'_>) {
    let device = &*(harness.make)(3);
    let models = [1, 2].map(|seed| Model::new(seed, chunks(device, 3), 6));
    let ranges = [0, 1].map(|i: usize| reserve(device, &models[i]));
    bring(device, ranges[0], &models[0]);
    for round in 0..10 {
        let (out, into) = (round % 2, (round + 1) % 2);
        // Queued back to back: the second only fits when the first has been done.
        let left = ask_out(device, ranges[out]);
        let came = ask_in(device, ranges[into], &models[into]);
        device.await_group(ranges[into], 5, Stream::CALLER).expect("the last group comes");
        end(&left).expect("the swap-out succeeds");
        end(&came).expect("the swap-in succeeds");
        assert_holds(device, ranges[into], &models[into]);
        assert_eq!(mapped_chunks(device), 3);
    }
}

fn out_behind_in(harness: &Harness<'_>) {
    let device = &*(harness.make)(3);
    let model = Model::new(1, chunks(device, 3), 5);
    let range = reserve(device, &model);
    for _ in 0..10 {
        let came = ask_in(device, range, &model);
        let left = ask_out(device, range);
        end(&came).expect("the swap-in is done before the swap-out");
        end(&left).expect("the swap-out succeeds");
        assert_eq!(mapped_chunks(device), 0);
        is_state_error(&device.await_group(range, 0, Stream::CALLER));
    }
    // Behind a swap-in that fails there is nothing to take away, and the range is out all the same.
    let other = reserve(device, &model);
    bring(device, other, &model);
    let came = ask_in(device, range, &model);
    let (done, left) = mpsc::channel();
    match device.swap_out(range, Box::new(move |result| drop(done.send(result)))) {
        Ok(()) => end(&left).expect("the swap-out succeeds"),
        // The swap-in had failed before the swap-out was asked for.
        refused @ Err(_) => is_state_error(&refused),
    }
    assert!(matches!(end(&came), Err(DeviceError::OutOfMemory { .. })));
    assert_holds(device, other, &model);
    device.release(range).expect("the range is out");
}

fn no_bytes(harness: &Harness<'_>) {
    let device = &*(harness.make)(1);
    let nothing = Model::new(0, 0, 0);
    let range = reserve(device, &nothing);
    assert_ne!(device.address(range).expect("the range is reserved"), 0);
    let full = Model::new(1, chunks(device, 1), 1);
    let other = reserve(device, &full);
    bring(device, other, &full);
    assert_eq!(bring(device, range, &nothing).copied, Bytes::ZERO);
    assert_eq!(mapped_chunks(device), 1, "no bytes take no chunk");
    assert_holds(device, range, &nothing);
    take(device, range);
    device.release(range).expect("the range is out");
    assert_holds(device, other, &full);
}

fn many_threads(harness: &Harness<'_>) {
    let device = &*(harness.make)(6);
    thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                // Four of two chunks in six: some swap-ins find the device full, and none may harm the others.
                let model = Model::new(seed, chunks(device, 2) - seed, 3);
                let range = reserve(device, &model);
                for _ in 0..25 {
                    let came = ask_in(device, range, &model);
                    let awaited = device.await_group(range, 2, Stream::CALLER);
                    match end(&came) {
                        Ok(_) => {
                            awaited.expect("a swap that succeeds brings its groups");
                            assert_holds(device, range, &model);
                            take(device, range);
                        }
                        Err(DeviceError::OutOfMemory { .. }) => assert!(awaited.is_err()),
                        Err(e) => panic!("{e}"),
                    }
                }
                device.release(range).expect("the range is out");
            });
        }
    });
    assert_eq!(mapped_chunks(device), 0);
}
