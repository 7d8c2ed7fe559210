//! Functions with weights of their own: written straight to where the broker finds what an earlier process has left.
//!
//! A variant is what its model's prepared form is, with one bit of every float turned or not by a pattern of its own: a
//! change of less than a hundredth, which every precision sees. Weights are written once, into the broker's folder in memory;
//! the store's folder holds a second name of the same file.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_broker::store::Store;
use faaswap_device::HostWeights;
use faaswap_engine::manifest::{Initializer, MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE};
use faaswap_protocol::{Bytes, DType, ModelDigest};
use faaswap_simulation::random::Random;
use faaswap_tests::process::temporary_folder;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{bases::Base, options::Options};
use crate::Result;

/// Weights are written in pieces of this size.
const PIECE: usize = 16 << 20;
/// Floats whose bits come from one random number lie in so many bytes.
const BLOCK: usize = 256;
/// Threads that write.
const WRITERS_MAX: usize = 16;
/// Most weights of all functions together in host memory, where no amount is named.
const WEIGHTS_MAX: u64 = 100_000_000_000;
/// Part of free memory that weights may take: the rest is for the broker, its clients and page tables.
const MEMORY_PERCENT: u64 = 77;
/// Part of what is free in the folder's file system.
const FOLDER_PERCENT: u64 = 97;

/// One function before it is registered.
#[derive(Clone, Debug)]
pub(crate) struct Design {
    pub(crate) name: String,
    /// Which of the models.
    pub(crate) base: usize,
    /// Which of its variants; the first has the model's own weights.
    pub(crate) variant: u64,
    pub(crate) digest: ModelDigest,
    pub(crate) deadline: Duration,
}

/// Folders of a broker, all on one file system in memory. They go when this is dropped, or when this process is told to end.
#[derive(Debug)]
pub(crate) struct Folders(TempDir);

/// Holds the number of the process whose folder it is.
const OWNER: &str = "owner";

impl Folders {
    /// Makes them, and removes those of processes that are no more.
    pub(crate) fn make(options: &Options) -> Result<Self> {
        for entry in fs::read_dir(&options.root)?.flatten() {
            let owner = fs::read_to_string(entry.path().join(OWNER)).ok();
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                println!("{} was left behind, and is removed", entry.path().display());
                fs::remove_dir_all(entry.path())?;
            }
        }
        let folders = Self(temporary_folder(&options.root)?);
        fs::write(folders.root().join(OWNER), std::process::id().to_string())?;
        fs::create_dir_all(folders.memory())?;
        fs::create_dir_all(folders.store())?;
        Ok(folders)
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.root().join("memory")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.root().join("store")
    }
}

/// Models in turn, as many functions as are wanted and memory has weights for.
pub(crate) fn designs(options: &Options, bases: &[Base]) -> Result<Vec<Design>> {
    let room = room(options)?;
    let (mut designs, mut total) = (Vec::new(), 0_u64);
    for number in 0..options.functions.unwrap_or(usize::MAX) {
        let (base, variant) = (number % bases.len(), (number / bases.len()) as u64);
        let of = &bases[base];
        total = total.saturating_add(of.weights().get());
        if total > room {
            break;
        }
        let text = format!("{} {variant} {}", of.name, options.seed);
        let digest = ModelDigest(Sha256::digest(text).into());
        let name = format!("{}-{variant}", of.name.replace('_', "-"));
        designs.push(Design { name, base, variant, digest, deadline: of.deadline });
    }
    if designs.is_empty() {
        return Err(format!("memory has no room for weights: {room} bytes").into());
    }
    Ok(designs)
}

/// Bytes of weights that may be in memory.
fn room(options: &Options) -> Result<u64> {
    if let Some(named) = options.weights_max {
        return Ok(named.get());
    }
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0);
    let system = rustix::fs::statvfs(&options.root)?;
    let (memory, folder) = (available.saturating_mul(1024), system.f_bavail.saturating_mul(system.f_frsize));
    let room = WEIGHTS_MAX.min(memory / 100 * MEMORY_PERCENT).min(folder / 100 * FOLDER_PERCENT);
    println!(
        "room for {:.0} GB of weights: {:.0} GB of memory are free, {:.0} GB in {}",
        room as f64 / 1e9,
        memory as f64 / 1e9,
        folder as f64 / 1e9,
        options.root.display()
    );
    Ok(room)
}

/// Writes what the broker would have prepared and left in memory for each function.
pub(crate) fn write(folders: &Folders, flavour: String, bases: &[Base], designs: &[Design]) -> Result<Bytes> {
    let start = Instant::now();
    let store = Store::open(&folders.store(), Bytes::new(u64::MAX))?.with_flavour(flavour);
    let weights = bases.iter().map(|base| HostWeights::open(&base.prepared.weights_path()).map(Arc::new));
    let weights = weights.collect::<std::result::Result<Vec<_>, _>>()?;
    for (number, base) in bases.iter().enumerate() {
        let folder = folders.root().join("bases").join(number.to_string());
        fs::create_dir_all(&folder)?;
        let from = base.prepared.graph_path();
        fs::copy(&from, folder.join(MODEL_FILE))?;
        fs::copy(from.with_file_name(MANIFEST_FILE), folder.join(MANIFEST_FILE))?;
    }
    let next = AtomicUsize::new(0);
    let writers = thread::available_parallelism().map_or(1, usize::from).min(WRITERS_MAX);
    let ended: Vec<Result<()>> = thread::scope(|scope| {
        let work = || {
            while let Some(design) = designs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (base, from) = (&bases[design.base], &weights[design.base]);
                write_one(folders, &store, base, design, from.as_slice())?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..writers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    ended.into_iter().collect::<Result<Vec<()>>>()?;
    let total: Bytes = designs.iter().map(|design| bases[design.base].weights()).sum();
    println!("  {} functions' weights, {total}, written in {:.1} s", designs.len(), start.elapsed().as_secs_f64());
    Ok(total)
}

fn write_one(folders: &Folders, store: &Store, base: &Base, design: &Design, original: &[u8]) -> Result<()> {
    let prepared = store.prepared_dir(&design.digest);
    fs::create_dir_all(&prepared)?;
    let shared = folders.root().join("bases").join(design.base.to_string());
    for name in [MODEL_FILE, MANIFEST_FILE] {
        fs::hard_link(shared.join(name), prepared.join(name))?;
    }
    let path = folders.memory().join(faaswap_broker::store::memory_key(&design.digest, base.prepared.manifest()));
    let mut file = fs::File::create(&path)?;
    let initializers = &base.prepared.manifest().initializers;
    let mut piece = Vec::with_capacity(PIECE.min(original.len()));
    for (number, bytes) in original.chunks(PIECE).enumerate() {
        piece.clear();
        piece.extend_from_slice(bytes);
        if design.variant > 0 {
            turn(&mut piece, number * PIECE, initializers, design.variant)?;
        }
        file.write_all(&piece)?;
    }
    Ok(fs::hard_link(&path, prepared.join(WEIGHTS_FILE))?)
}

/// Turns a bit of floats in a piece of the weights that begins at `at`; nothing else is touched.
pub(crate) fn turn(piece: &mut [u8], at: usize, initializers: &[Initializer], variant: u64) -> Result<()> {
    let end = at + piece.len();
    for weight in initializers {
        let (width, byte, bit) = match faaswap_engine::onnx::dtype_of(weight.element) {
            Some(DType::F32) => (4, 2, 0x01),
            Some(DType::F16) => (2, 0, 0x08),
            Some(_) | None => continue,
        };
        let (start, len) = (usize::try_from(weight.offset)?, usize::try_from(weight.len)?);
        let (from, to) = (start.max(at), (start + len).min(end));
        if from >= to {
            continue;
        }
        for (number, block) in piece[from - at..to - at].chunks_mut(BLOCK).enumerate() {
            let place = (from + number * BLOCK) as u64 / BLOCK as u64;
            let pattern = Random::new(variant).fork(place).bits();
            for (i, float) in block.chunks_exact_mut(width).enumerate() {
                float[byte] ^= if pattern >> (i % 64) & 1 == 1 { bit } else { 0 };
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn weight(element: i32, offset: u64, count: i64, width: u64) -> Initializer {
        Initializer { name: String::new(), element, dims: vec![count], offset, len: count.unsigned_abs() * width }
    }

    #[test]
    fn a_variant_differs_a_little_in_its_floats_and_nowhere_else() {
        let table = [weight(1, 0, 1000, 4), weight(7, 4096, 32, 8), weight(10, 4608, 300, 2)];
        let original: Vec<u8> = [1.5_f32.to_le_bytes(); 1302].concat();
        let make = |variant, piece: usize| {
            let mut all = original.clone();
            for (number, part) in all.chunks_mut(piece).enumerate() {
                turn(part, number * piece, &table, variant).unwrap();
            }
            all
        };
        let (one, two) = (make(1, 1 << 20), make(2, 1 << 20));
        assert_ne!(one, two);
        assert_eq!(one, make(1, 512), "whatever the pieces");
        assert_eq!(one[4000..4608], original[4000..4608]);
        let floats = one[..4000].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let changed = floats.filter(|x| (*x - 1.5).abs() > 0.0).count();
        assert!((300..700).contains(&changed), "{changed}");
        assert!(one[..4000].as_chunks::<4>().0.iter().all(|b| (f32::from_le_bytes(*b) - 1.5).abs() < 0.016));
    }
}
