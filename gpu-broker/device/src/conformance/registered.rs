//! Inputs of programs that lie in registered memory. A device without programs has none.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use memmap2::{MmapMut, MmapOptions};

use super::Harness;
use crate::{
    DeviceError,
    cuda::{CudaDevice, IO_ALIGN, Program, Registered},
};

const LEN: usize = 3 << 20;

/// Memory that notes when it goes.
struct Owner {
    bytes: MmapMut,
    gone: Arc<AtomicBool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
    }
}

/// Registers memory with a pattern in it; gives where it is and what tells that it has gone.
fn registered(cuda: &CudaDevice) -> (Registered, usize, Arc<AtomicBool>) {
    let mut bytes = MmapOptions::new().len(LEN).map_anon().expect("host memory is there");
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = pattern(at));
    let gone = Arc::new(AtomicBool::new(false));
    let address = bytes.as_ptr();
    let owner = Owner { bytes, gone: Arc::clone(&gone) };
    // SAFETY: the mapping has this length, can be written, and is the owner's.
    let registered = unsafe { cuda.register(address, owner.bytes.len(), owner) }.expect("memory can be registered");
    (registered, address.expose_provenance(), gone)
}

#[expect(clippy::cast_possible_truncation, reason = "the lowest byte is what is wanted")]
fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b9) >> 13) as u8
}

fn patterns(at: usize, len: usize) -> Vec<u8> {
    (at..at + len).map(pattern).collect()
}

/// A program of nothing: its outputs are what lies where they are, its inputs.
fn nothing(cuda: &CudaDevice) -> Program {
    let captured = cuda.bind(None, |binding| cuda.capture(0, binding, &[], || Ok::<_, DeviceError>(())));
    let program = captured.map(|(program, _)| program);
    program.expect("nothing can be captured")
}

pub(super) fn read_in_place(harness: &Harness<'_>) {
    let device = (harness.make)(2);
    let Some(cuda) = device.as_cuda() else { return };
    let program = nothing(cuda);
    let (memory, base, _) = registered(cuda);
    // Inputs of the lane's own before, between and behind two in place.
    let (first, second) = (1000_usize, 600_004_usize);
    let at = [0, IO_ALIGN, 2 * IO_ALIGN + 1024, 4 * IO_ALIGN + 1024];
    let long = at[3] + second.next_multiple_of(IO_ALIGN);
    let end = long + IO_ALIGN;
    cuda.io_address(0, end).expect("the lane has memory");
    for round in 0..3_usize {
        let mut run = cuda.begin(&program).expect("the lane is free");
        run.bytes(0, end).expect("it is there").fill(0xEE);
        run.bytes(at[0], 10).expect("it is there").fill(1);
        let from = 64 * round;
        assert!(run.read_in_place((at[1], first), &memory, base + from).expect("it is in order"));
        run.bytes(at[2], 10).expect("it is there").fill(2);
        assert!(run.read_in_place((at[3], second), &memory, base + (1 << 20) + from).expect("it is in order"));
        run.bytes(long, 10).expect("it is there").fill(3);
        run.go(None, (0, end), (0, end)).expect("it runs");
        let mut there = |offset, len| run.bytes(offset, len).expect("it is there").to_vec();
        assert_eq!([there(at[0], 10), there(at[2], 10), there(long, 10)], [[1; 10], [2; 10], [3; 10]], "its own");
        assert!(there(at[1], first) == patterns(from, first), "the first in place");
        assert!(there(at[3], second) == patterns((1 << 20) + from, second), "the second in place");
    }
}

pub(super) fn not_in_place(harness: &Harness<'_>) {
    let device = (harness.make)(2);
    let Some(cuda) = device.as_cuda() else { return };
    let program = nothing(cuda);
    let (memory, base, _) = registered(cuda);
    cuda.io_address(0, 4 * IO_ALIGN).expect("the lane has memory");
    let mut run = cuda.begin(&program).expect("the lane is free");
    for (address, len) in [(base + 8, 64), (base + LEN - 16, 32), (base + LEN, 16), (base - 16, 16), (base, 0)] {
        assert_eq!(run.read_in_place((0, len), &memory, address), Ok(false), "{len} bytes at {address}, not {base}");
    }
    assert!(run.read_in_place((16, 16), &memory, base).is_err(), "an input that is not aligned");
    assert_eq!(run.read_in_place((IO_ALIGN, 16), &memory, base), Ok(true));
    assert!(run.read_in_place((0, 16), &memory, base).is_err(), "an input before one that was told");
    assert!(run.read_in_place((1 << 40, 16), &memory, base).is_err(), "outside of the lane's memory");
}

pub(super) fn given_back(harness: &Harness<'_>) {
    let device = (harness.make)(2);
    let Some(cuda) = device.as_cuda() else { return };
    let (memory, base, gone) = registered(cuda);
    let address = std::ptr::with_exposed_provenance::<u8>(base);
    // SAFETY: the memory that is registered is mapped; this fails.
    let again = unsafe { cuda.register(address, LEN, ()) };
    assert!(again.is_err() && !gone.load(Ordering::SeqCst), "it is registered, and its owner there");
    drop(memory);
    assert!(gone.load(Ordering::SeqCst), "its owner goes with it");
    // The driver would refuse memory at these addresses, had it not been given back: new memory comes there, mostly.
    for _ in 0..3 {
        drop(registered(cuda));
    }
}
