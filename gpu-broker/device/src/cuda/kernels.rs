//! Kernels of our own: they copy and fill memory.
//!
//! A GPU's copy engine does one copy after the other. While weights arrive it is many milliseconds behind, and whatever
//! else went through it would wait: so inputs, and copies and fills inside of programs, are done by kernels.

use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::Arc,
};

use cudarc::driver::sys as cu;

use super::{
    driver::{Context, check, tell},
    queue::Queue,
};
use crate::DeviceError;

/// What a kernel does with `n` units at `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Copies so many bytes from an address.
    Copy { to: u64, from: u64, len: usize },
    /// Writes a word of 4 bytes, or one byte, again and again.
    Fill { to: u64, value: u32, len: usize, words: bool },
    /// Fails, and the whole context with it: for tests of what happens then.
    Trap,
}

/// A kernel with its three arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    function: usize,
    arguments: [u64; 3],
}

/// The kernels, loaded.
pub(super) struct Kernels {
    context: Arc<Context>,
    module: usize,
    /// In the order of [`NAMES`].
    functions: [usize; NAMES.len()],
}

const NAMES: [&CStr; 5] = [c"copy16", c"copy1", c"fill4", c"fill1", c"trap"];
/// The text of a kernel over `n` units: every thread takes those at its own place and then at every so many further on.
/// `%d1` is where to, `%d2` the second argument, `%d4` the unit.
macro_rules! kernel {
    ($name:literal, $second:literal, $before:literal, $each:literal) => {
        concat!(
            ".visible .entry ",
            $name,
            "(.param .u64 to, .param .u64 ",
            $second,
            ", .param .u64 n)
{
    .reg .pred %p<2>;
    .reg .b32 %r<12>;
    .reg .b64 %d<10>;
    ld.param.u64 %d1, [to];
    ld.param.u64 %d2, [",
            $second,
            "];
    ld.param.u64 %d3, [n];
    cvta.to.global.u64 %d1, %d1;
    ",
            $before,
            "
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mad.lo.u32 %r5, %r1, %r2, %r3;
    cvt.u64.u32 %d4, %r5;
    mul.lo.u32 %r6, %r2, %r4;
    cvt.u64.u32 %d5, %r6;
next:
    setp.ge.u64 %p1, %d4, %d3;
    @%p1 bra done;
",
            $each,
            "    add.u64 %d4, %d4, %d5;
    bra next;
done:
    ret;
}
"
        )
    };
}

const PTX: &str = concat!(
    "
.version 7.0
.target sm_70
.address_size 64
",
    kernel!(
        "copy16",
        "from",
        "cvta.to.global.u64 %d2, %d2;",
        "    shl.b64 %d6, %d4, 4;
    add.u64 %d7, %d2, %d6;
    add.u64 %d8, %d1, %d6;
    ld.volatile.global.v4.u32 {%r7, %r8, %r9, %r10}, [%d7];
    st.global.v4.u32 [%d8], {%r7, %r8, %r9, %r10};
"
    ),
    kernel!(
        "copy1",
        "from",
        "cvta.to.global.u64 %d2, %d2;",
        "    add.u64 %d7, %d2, %d4;
    add.u64 %d8, %d1, %d4;
    ld.volatile.global.u8 %r7, [%d7];
    st.global.u8 [%d8], %r7;
"
    ),
    kernel!(
        "fill4",
        "value",
        "cvt.u32.u64 %r7, %d2;",
        "    shl.b64 %d6, %d4, 2;
    add.u64 %d8, %d1, %d6;
    st.global.u32 [%d8], %r7;
"
    ),
    kernel!(
        "fill1",
        "value",
        "cvt.u32.u64 %r7, %d2;",
        "    add.u64 %d8, %d1, %d4;
    st.global.u8 [%d8], %r7;
"
    ),
    ".visible .entry trap(.param .u64 to, .param .u64 from, .param .u64 n)
{
    trap;
    ret;
}
\0"
);
const THREADS: u32 = 256;
/// Enough to keep the bus busy, few enough to leave the GPU to others.
const BLOCKS_MAX: u32 = 64;

impl Kernels {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut module = ptr::null_mut();
        // SAFETY: the text is PTX and ends with zero; the driver compiles it and writes a handle, which is ours.
        check("cuModuleLoadData", unsafe { cu::cuModuleLoadData(&raw mut module, PTX.as_ptr().cast()) })?;
        let mut kernels =
            Self { context: Arc::clone(context), module: module.expose_provenance(), functions: [0; NAMES.len()] };
        for (place, name) in kernels.functions.iter_mut().zip(NAMES) {
            let mut function = ptr::null_mut();
            // SAFETY: the module is alive, the name ends with zero; the function lives as long as its module.
            let found = unsafe { cu::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
            check("cuModuleGetFunction", found)?;
            *place = function.expose_provenance();
        }
        Ok(kernels)
    }

    fn call(&self, work: Work) -> Call {
        let (function, arguments) = match work {
            Work::Copy { to, from, len } if (to | from | len as u64).is_multiple_of(16) => {
                (0, [to, from, len as u64 / 16])
            }
            Work::Copy { to, from, len } => (1, [to, from, len as u64]),
            Work::Fill { to, value, len, words: true } => (2, [to, u64::from(value), len as u64 / 4]),
            Work::Fill { to, value, len, words: false } => (3, [to, u64::from(value), len as u64]),
            Work::Trap => (4, [0; 3]),
        };
        Call { function: self.functions[function], arguments }
    }

    /// Queues work.
    ///
    /// # Safety
    /// The device must be able to read and write what the work names, until it is done.
    pub(super) unsafe fn queue(&self, work: Work, on: &Queue) -> Result<(), DeviceError> {
        let Call { function, mut arguments } = self.call(work);
        let mut places = arguments.each_mut().map(|argument| ptr::from_mut(argument).cast::<c_void>());
        let function = ptr::with_exposed_provenance_mut(function);
        let blocks = blocks(arguments[2]);
        // SAFETY: each kernel takes three 64-bit numbers, which the driver copies before it returns; the caller answers
        // for the memory.
        let result = unsafe {
            let none = ptr::null_mut();
            cu::cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, on.raw(), places.as_mut_ptr(), none)
        };
        check("cuLaunchKernel", result)
    }

    /// Adds work to a graph, behind these nodes.
    ///
    /// # Safety
    /// The graph and its nodes must be alive; what the work names must be there whenever the graph runs.
    pub(super) unsafe fn add(
        &self,
        work: Work,
        graph: cu::CUgraph,
        behind: &[cu::CUgraphNode],
    ) -> Result<cu::CUgraphNode, DeviceError> {
        let Call { function, mut arguments } = self.call(work);
        let blocks = blocks(arguments[2]);
        let mut places = arguments.each_mut().map(|argument| ptr::from_mut(argument).cast::<c_void>());
        let parameters = cu::CUDA_KERNEL_NODE_PARAMS {
            func: ptr::with_exposed_provenance_mut(function),
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: places.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        let mut node = ptr::null_mut();
        // SAFETY: the table of nodes has the length said; the driver copies the parameters and writes a handle, which is
        // the graph's. The caller answers for the rest.
        let added = unsafe {
            cu::cuGraphAddKernelNode_v2(&raw mut node, graph, behind.as_ptr(), behind.len(), &raw const parameters)
        };
        check("cuGraphAddKernelNode", added).map(|()| node)
    }
}

fn blocks(units: u64) -> u32 {
    u32::try_from(units.div_ceil(u64::from(THREADS))).unwrap_or(u32::MAX).clamp(1, BLOCKS_MAX)
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the module is ours, and what ran in it was waited for.
            tell("cuModuleUnload", unsafe { cu::cuModuleUnload(ptr::with_exposed_provenance_mut(self.module)) });
        }
    }
}
