//! The conformance suite on the GPU.

use std::sync::{Arc, Mutex};

use faaswap_device::{
    Device,
    conformance::{CASES, Harness},
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;

use crate::Result;

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
    Ok(())
}
