//! Limits that the preparing process sets on itself before it opens a model: what a hostile file can take from the node.

use std::{io, time::Duration};

use faaswap_protocol::Bytes;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::EngineError;

/// Most files that preparing one model holds open.
const OPEN_FILES_MAX: u64 = 256;

/// What one preparation may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrepareLimits {
    /// Address space. About four times the model and 2 GiB more are needed: the runtime's library, the model as it
    /// came, as it was optimized, and as it was bound for its trial run.
    pub memory: Bytes,
    /// Whether a GPU's driver is used: it reserves addresses without end, so that only memory with data is limited.
    pub on_gpu: bool,
    /// Processor time; the process is killed when it is used up.
    pub cpu_time: Duration,
    /// Largest file that may be written. The optimized weights and the flat weights are about as large as the model.
    pub file_bytes: Bytes,
}

/// Sets the limits on the calling process. There is no way back.
pub fn limit_this_process(limits: &PrepareLimits) -> Result<(), EngineError> {
    let cpu = limits.cpu_time.as_secs().max(1);
    let address_space = if limits.on_gpu { None } else { Some(limits.memory.get()) };
    let all = [
        ("data memory", Resource::Data, limits.memory.get()),
        ("processor time", Resource::Cpu, cpu),
        ("file size", Resource::Fsize, limits.file_bytes.get()),
        ("open files", Resource::Nofile, OPEN_FILES_MAX),
        ("core dumps", Resource::Core, 0),
    ];
    let all = all.map(|(what, resource, most)| (what, resource, Some(most)));
    for (what, resource, most) in all.into_iter().chain([("address space", Resource::As, address_space)]) {
        let limit = Rlimit { current: most, maximum: most };
        setrlimit(resource, limit).map_err(|e| EngineError::Limit { what, source: io::Error::from(e) })?;
    }
    Ok(())
}
