//! The conformance suite on the GPU, and what only a GPU has to promise.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use faaswap_device::{
    Device, Group, HostWeights,
    conformance::{CASES, Harness},
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;

use crate::{Result, model};

/// Weights that come and go while constants are written.
const BESIDE: Bytes = Bytes::mib(128);
/// Device memory for them, and what is kept free.
const MEMORY: Bytes = Bytes::mib(192);
/// How often constants are written, and how many bytes: what the driver sends with its commands, and what it copies.
const WRITTEN: u32 = 3_000;
const WRITTEN_BYTES: [usize; 3] = [256, 6 << 10, 96 << 10];

pub(crate) fn run() -> Result<()> {
    let chunk = Bytes::mib(2);
    // `peek` is given an address alone; any device of the GPU can read it.
    let reader: Mutex<Option<Arc<CudaDevice>>> = Mutex::new(None);
    let make = |chunks: u64| {
        let memory = Some(Bytes::new(chunk.get() * chunks));
        let config = CudaConfig { memory, chunk, lanes: 1, ..CudaConfig::new("cuda0", 0) };
        let device = CudaDevice::open(&config).expect("the GPU can be opened");
        if let Ok(mut reader) = reader.lock() {
            *reader = Some(Arc::clone(&device));
        }
        device as Arc<dyn Device>
    };
    let peek = |address: usize, into: &mut [u8]| {
        let reader = reader.lock().ok().and_then(|reader| reader.clone()).expect("a device was made");
        reader.peek(address, into).expect("device memory can be read");
    };
    for (name, case) in CASES {
        eprintln!("conformance: {name}");
        case(&Harness { make: &make, peek: &peek });
    }
    println!("conformance: {} cases passed on cuda0", CASES.len());
    constants_are_there_for_all_streams()
}

/// What was placed as constants is read at once in a lane's stream, which waits for nobody, while the link is busy.
fn constants_are_there_for_all_streams() -> Result<()> {
    let device = CudaDevice::open(&CudaConfig { memory: Some(MEMORY), lanes: 1, ..model::config(0)? })?;
    let weights = Arc::new(HostWeights::from_bytes(&vec![0; BESIDE.as_len().unwrap_or(0)])?);
    device.prepare_weights(&weights)?;
    let range = device.reserve(BESIDE)?;
    let stop = AtomicBool::new(false);
    let come_and_go = || -> Result<()> {
        let groups: Arc<[Group]> = [Group { offset: 0, len: BESIDE.get() }].into();
        while !stop.load(Ordering::Relaxed) {
            let (tell, told) = mpsc::channel();
            let came = Box::new(move |result: std::result::Result<_, _>| drop(tell.send(result.map(drop))));
            device.swap_in(range, Arc::clone(&weights), Arc::clone(&groups), came)?;
            told.recv()??;
            let (tell, told) = mpsc::channel();
            device.swap_out(range, Box::new(move |result| drop(tell.send(result))))?;
            told.recv()??;
        }
        Ok(())
    };
    let late = thread::scope(|scope| -> Result<u32> {
        let beside = scope.spawn(come_and_go);
        let written = write_and_read(&device);
        stop.store(true, Ordering::Relaxed);
        beside.join().unwrap_or_else(|_| Err("a thread panicked".into()))?;
        written
    })?;
    device.release(range)?;
    println!("constants: {WRITTEN} times written beside copies, {late} times not there");
    if late > 0 { Err(format!("constants were not there {late} times of {WRITTEN}").into()) } else { Ok(()) }
}

/// How often what was written is not what is read.
fn write_and_read(device: &CudaDevice) -> Result<u32> {
    let (stream, most) = (device.stream(0)?, WRITTEN_BYTES.into_iter().max().unwrap_or(0));
    let there = device.io_address(0, most)?;
    let mut late = 0;
    for round in 0..WRITTEN {
        let len = WRITTEN_BYTES[round as usize % WRITTEN_BYTES.len()];
        let bytes: Vec<u8> = round.to_ne_bytes().into_iter().cycle().take(len).collect();
        // They go at the end of each round, so that the next ones may lie there.
        let constants = device.constants();
        let address = device.place_constants(&constants, &bytes)?;
        device.copy_within(stream, there, address, len)?;
        device.finish(0)?;
        let mut seen = vec![0; len];
        device.peek(there, &mut seen)?;
        late += u32::from(seen != bytes);
    }
    Ok(late)
}
