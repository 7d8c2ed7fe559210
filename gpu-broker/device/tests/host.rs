//! The host device: the suite that every device passes, and what only this one can show.

#![allow(clippy::unwrap_used, reason = "tests")]
#![expect(unsafe_code, reason = "programs read their weights at bare addresses, and so do these tests")]

use std::{
    env,
    os::unix::process::ExitStatusExt,
    process::Command,
    ptr,
    sync::{Arc, mpsc},
    thread,
};

use faaswap_device::{
    Device, DeviceError, Group, HostWeights, Stream,
    conformance::{CASES, Harness},
    host::{HostConfig, HostDevice},
};
use faaswap_protocol::Bytes;

/// SIGSEGV on Linux.
const SEGMENTATION_FAULT: i32 = 11;

fn config(chunk: Bytes, chunks: u64) -> HostConfig {
    HostConfig { chunk, ..HostConfig::new("test", Bytes::new(chunk.get() * chunks)) }
}

fn device(chunks: u64) -> Arc<HostDevice> {
    HostDevice::new(config(Bytes::kib(64), chunks)).unwrap()
}

fn peek(address: usize, into: &mut [u8]) {
    let from = ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: tests peek only at ranges whose weights have arrived, inside of their weights.
    unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
}

fn conforms(config: impl Fn(u64) -> HostConfig) {
    let make = |chunks| HostDevice::new(config(chunks)).unwrap() as Arc<dyn Device>;
    for (name, case) in CASES {
        eprintln!("case {name}");
        case(&Harness { make: &make, peek: &peek });
    }
}

#[test]
fn the_host_device_conforms_with_small_chunks() {
    conforms(|chunks| config(Bytes::kib(64), chunks));
}

#[test]
fn the_host_device_conforms_with_the_usual_chunks() {
    conforms(|chunks| config(Bytes::mib(2), chunks));
}

#[test]
fn the_host_device_conforms_when_its_memory_comes_late() {
    conforms(|chunks| HostConfig { populate: false, ..config(Bytes::kib(64), chunks) });
}

#[test]
fn the_host_device_conforms_behind_a_slow_link() {
    conforms(|chunks| HostConfig { link_bytes_per_second: Some(400 << 20), ..config(Bytes::kib(64), chunks) });
}

fn weights(len: usize) -> (Arc<HostWeights>, Arc<[Group]>) {
    let bytes = vec![0x5a; len];
    let half = u64::try_from(len / 2).unwrap();
    let groups = [Group { offset: 0, len: half }, Group { offset: half, len: len as u64 - half }];
    (Arc::new(HostWeights::from_bytes(&bytes).unwrap()), groups.into())
}

/// Asks for a swap-in whose end is told on the channel.
fn ask_in(device: &HostDevice, len: usize) -> (faaswap_device::RangeId, mpsc::Receiver<Result<(), DeviceError>>) {
    let (weights, groups) = weights(len);
    let range = device.reserve(weights.size()).unwrap();
    let (done, outcome) = mpsc::channel();
    let done = Box::new(move |result: Result<_, _>| drop(done.send(result.map(|_| ()))));
    device.swap_in(range, weights, groups, done).unwrap();
    (range, outcome)
}

/// Runs in a process of its own: reads a weight while it is there, then when it is not.
fn touch_before_and_after_swap_out() {
    let device = device(4);
    let (range, came) = ask_in(&device, 100_000);
    came.recv().unwrap().unwrap();
    let address = device.address(range).unwrap();
    let mut byte = [0];
    peek(address, &mut byte);
    println!("swapped in: {:#x}", byte[0]);
    let (done, left) = mpsc::channel();
    device.swap_out(range, Box::new(move |result| drop(done.send(result)))).unwrap();
    left.recv().unwrap().unwrap();
    peek(address, &mut byte);
    println!("swapped out: {:#x}", byte[0]);
}

#[test]
fn a_swapped_out_range_faults() {
    const CHILD: &str = "FAASWAP_TEST_TOUCH";
    if env::var_os(CHILD).is_some() {
        return touch_before_and_after_swap_out();
    }
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_swapped_out_range_faults", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(said.contains("swapped in: 0x5a"), "{said}");
    assert!(!said.contains("swapped out"), "{said}");
    assert_eq!(child.status.signal(), Some(SEGMENTATION_FAULT), "{said}");
}

#[test]
fn the_first_group_can_be_used_before_the_last_one_is_there() {
    let slow = HostConfig { link_bytes_per_second: Some(2 << 20), ..config(Bytes::kib(64), 4) };
    let device = HostDevice::new(slow).unwrap();
    // A test thread that is held up sees both at once, so one of several tries must do.
    let early = (0..20).any(|_| {
        let (range, outcome) = ask_in(&device, 200_000);
        device.await_group(range, 0, Stream::CALLER).unwrap();
        let early = outcome.try_recv().is_err();
        if early {
            outcome.recv().unwrap().unwrap();
        }
        let (done, left) = mpsc::channel();
        device.swap_out(range, Box::new(move |result| drop(done.send(result)))).unwrap();
        left.recv().unwrap().unwrap();
        early
    });
    assert!(early);
}

#[test]
fn a_lost_device_wakes_everyone_and_refuses_everything() {
    let slow = HostConfig { link_bytes_per_second: Some(1 << 16), ..config(Bytes::kib(64), 64) };
    let device = HostDevice::new(slow).unwrap();
    // The first would copy for a minute; the second waits behind it.
    let (range, copying) = ask_in(&device, 4 << 20);
    let (second, queued) = ask_in(&device, 1 << 16);
    thread::scope(|scope| {
        let waiting = [range, second].map(|range| {
            let device = &device;
            scope.spawn(move || device.await_group(range, 1, Stream::CALLER))
        });
        device.lose();
        for waiting in waiting {
            assert_eq!(waiting.join().unwrap(), Err(DeviceError::Lost));
        }
    });
    assert_eq!(copying.recv().unwrap(), Err(DeviceError::Lost));
    assert_eq!(queued.recv().unwrap(), Err(DeviceError::Lost));
    assert_eq!(device.reserve(Bytes::kib(1)), Err(DeviceError::Lost));
    assert_eq!(device.address(range), Err(DeviceError::Lost));
    assert_eq!(device.release(range), Err(DeviceError::Lost));
    assert_eq!(device.await_group(range, 0, Stream::CALLER), Err(DeviceError::Lost));
    assert_eq!(device.read_back(range, 0, &mut [0]), Err(DeviceError::Lost));
    assert_eq!(device.swap_out(range, Box::new(|_| {})), Err(DeviceError::Lost));
    let (weights, groups) = weights(1 << 16);
    assert_eq!(device.swap_in(second, weights, groups, Box::new(|_| {})), Err(DeviceError::Lost));
}

#[test]
fn a_group_that_had_arrived_is_lost_with_its_device() {
    let device = device(4);
    let (range, came) = ask_in(&device, 100_000);
    came.recv().unwrap().unwrap();
    device.await_group(range, 1, Stream::CALLER).unwrap();
    device.lose();
    assert_eq!(device.await_group(range, 1, Stream::CALLER), Err(DeviceError::Lost));
}

#[test]
fn dropping_a_device_ends_the_swaps_that_are_queued() {
    let slow = HostConfig { link_bytes_per_second: Some(1 << 16), ..config(Bytes::kib(64), 64) };
    let device = HostDevice::new(slow).unwrap();
    let outcomes = [4 << 20, 1 << 16, 1 << 16].map(|len| ask_in(&device, len).1);
    drop(device);
    for outcome in outcomes {
        assert_eq!(outcome.recv().unwrap(), Err(DeviceError::Lost));
    }
}

#[test]
fn a_device_may_be_dropped_by_its_own_callback() {
    let device = device(4);
    let (weights, groups) = weights(1000);
    let range = device.reserve(weights.size()).unwrap();
    let (done, outcome) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let last = Arc::clone(&device);
    let callback = Box::new(move |result: Result<_, DeviceError>| {
        gone.recv().unwrap();
        drop(last);
        done.send(result.map(|_| ())).unwrap();
    });
    device.swap_in(range, weights, groups, callback).unwrap();
    drop(device);
    go.send(()).unwrap();
    outcome.recv().unwrap().unwrap();
}

#[test]
fn a_callback_that_panics_costs_the_device_and_nobody_waits_for_ever() {
    let device = device(4);
    let (weights, groups) = weights(1000);
    let range = device.reserve(weights.size()).unwrap();
    let second = device.reserve(Bytes::new(1000)).unwrap();
    let (entered, go) = (mpsc::channel(), mpsc::channel::<()>());
    let callback = Box::new(move |_: Result<_, _>| {
        entered.0.send(()).unwrap();
        go.1.recv().unwrap();
        panic!("a bug of the caller");
    });
    device.swap_in(range, Arc::clone(&weights), Arc::clone(&groups), callback).unwrap();
    entered.1.recv().unwrap();
    let (done, outcome) = mpsc::channel();
    let done = Box::new(move |result: Result<_, _>| drop(done.send(result.map(|_| ()))));
    device.swap_in(second, weights, groups, done).unwrap();
    go.0.send(()).unwrap();
    assert_eq!(device.await_group(second, 0, Stream::CALLER), Err(DeviceError::Lost));
    assert_eq!(outcome.recv().unwrap(), Err(DeviceError::Lost));
}

#[test]
fn a_configuration_that_makes_no_device_is_refused() {
    let good = config(Bytes::kib(64), 2);
    let bad = [
        HostConfig { chunk: Bytes::ZERO, ..good.clone() },
        HostConfig { chunk: Bytes::new(5000), ..good.clone() },
        HostConfig { capacity: Bytes::kib(63), ..good.clone() },
        HostConfig { link_bytes_per_second: Some(0), ..good.clone() },
    ];
    for config in bad {
        let refused = HostDevice::new(config.clone());
        assert!(matches!(refused, Err(DeviceError::Invalid(_))), "{config:?}");
    }
    let odd = HostConfig { capacity: Bytes::kib(200), ..good };
    assert_eq!(HostDevice::new(odd).unwrap().info().capacity, Bytes::kib(192), "rounded down to whole chunks");
}

#[test]
fn several_devices_are_independent() {
    let (a, b) = (device(4), device(4));
    let (range, came) = ask_in(&a, 200_000);
    let (other, came_too) = ask_in(&b, 200_000);
    came.recv().unwrap().unwrap();
    came_too.recv().unwrap().unwrap();
    b.lose();
    assert_ne!(a.address(range), b.address(other));
    let mut byte = [0];
    a.read_back(range, 199_999, &mut byte).unwrap();
    assert_eq!(byte, [0x5a]);
}
