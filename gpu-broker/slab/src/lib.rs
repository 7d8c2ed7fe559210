//! The memory that a sidecar and the broker share, behind checked offsets, and the passing of file descriptors.
//!
//! Decides what a valid slab is (sealed, of the agreed size) and that no access leaves it. What lies in it, who may use
//! which slot and when, is up to the two ends: [`SlotAllocator`] keeps the books of one half for the end that owns it.

#![expect(unsafe_code, reason = "one of the three fences: this crate maps memory that another process writes")]
#![warn(missing_docs)]

use std::io;

use faaswap_protocol::{Bytes, Span};

pub mod fds;
mod memory;
mod slots;

pub use memory::{BytesOwner, Region, Slab};
pub use slots::{SLOTS_MAX, SlotAllocator, SlotError};

/// Why there is no slab, or no such place in it.
#[derive(Debug, thiserror::Error)]
pub enum SlabError {
    /// The halves are not ones that a slab can have.
    #[error("a slab cannot have {request} for requests and {response} for responses")]
    Layout {
        /// The request half.
        request: Bytes,
        /// The response half.
        response: Bytes,
    },
    /// The peer could take the memory away under our hands.
    #[error("the slab's file is not sealed against shrinking, growing and further seals")]
    NotSealed,
    /// The file is not what the layout says.
    #[error("the slab's file has {found}, its layout says {expected}")]
    Size {
        /// By the layout.
        expected: Bytes,
        /// By the file.
        found: Bytes,
    },
    /// A tensor outside of its half of the slab, or at an address that no tensor may have.
    #[error("{} bytes at {} do not lie aligned in bytes {start}..{end} of the slab", span.len, span.offset)]
    Span {
        /// What was asked for.
        span: Span,
        /// Where the half starts.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// An access past the end of a region.
    #[error("{len} bytes at {at} do not lie in a region of {region} bytes")]
    Access {
        /// First byte in the region.
        at: usize,
        /// Number of bytes.
        len: usize,
        /// Length of the region.
        region: usize,
    },
    /// The operating system refused.
    #[error("{call} failed: {source}")]
    Os {
        /// The call that failed.
        call: &'static str,
        /// What it said.
        source: io::Error,
    },
}
