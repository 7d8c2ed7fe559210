//! Rewrites a captured graph: copies and fills become kernels, and what it reads from host memory becomes its own.
//!
//! The copy engine would make them wait for weights that arrive, also those of other models. And a copy from pageable
//! host memory reads, at each launch, what its session has left there: nothing that outlives the session.

use std::{mem::MaybeUninit, ptr, sync::Arc};

use cudarc::driver::sys as cu;

use super::{
    drawn::{Drawn, kind_of},
    driver::{Context, check},
    host_memory::Pinned,
    kernels::{Kernels, Work},
};
use crate::DeviceError;

/// What became of a graph's nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Nodes in all.
    pub(super) nodes: usize,
    /// Copies and fills that are kernels now.
    pub(super) replaced: usize,
    /// Those of them that read the host's memory.
    pub(super) from_host: usize,
    /// Copies and fills that stay as they are: of shapes that our kernels do not know.
    pub(super) left: usize,
}

/// What became of a graph.
#[derive(Debug, Default)]
pub(super) struct Rewritten {
    pub(super) counts: Counts,
    /// What was read from the host's memory. It stays as long as the graph.
    _host: Vec<Pinned>,
}

impl Counts {
    /// Whether all that it does is kernels, with nothing of the host's.
    pub(super) fn is_plain(self) -> bool {
        self.from_host == 0 && self.left == 0
    }

    /// Of a copy of such a graph.
    pub(super) fn of_plain(self) -> Rewritten {
        Rewritten { counts: self, _host: Vec::new() }
    }
}

/// Rewrites a graph of ours that was just captured and is not instantiated yet.
pub(super) fn rewrite(context: &Arc<Context>, drawn: &Drawn, kernels: &Kernels) -> Result<Rewritten, DeviceError> {
    let (graph, nodes) = (drawn.raw(), drawn.nodes()?);
    let mut done = Rewritten { counts: Counts { nodes: nodes.len(), ..Counts::default() }, _host: Vec::new() };
    let nodes = nodes.into_iter().map(|node| Ok((node, kind_of(node)?))).collect::<Result<Vec<_>, DeviceError>>()?;
    let takes_memory = |kind| kind == cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC;
    if nodes.iter().any(|&(_, kind)| takes_memory(kind)) {
        return keep_all(context, nodes, done);
    }
    for (node, kind) in nodes {
        let work = if kind == cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY {
            copy_of(context, node, &mut done._host)?
        } else if kind == cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET {
            fill_of(node)?
        } else {
            continue;
        };
        match work {
            Some(work) => {
                replace(graph, node, kernels, work)?;
                done.counts.replaced += 1;
            }
            None => done.counts.left += 1,
        }
    }
    done.counts.from_host = done._host.len();
    Ok(done)
}

/// Leaves a graph as it is that takes memory itself: the driver lets no node of such a one be replaced. What it reads
/// from host memory cannot become its own then.
fn keep_all(
    context: &Arc<Context>,
    nodes: Vec<(cu::CUgraphNode, cu::CUgraphNodeType)>,
    mut done: Rewritten,
) -> Result<Rewritten, DeviceError> {
    for (node, kind) in nodes {
        if kind == cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY {
            let mut host = Vec::new();
            copy_of(context, node, &mut host)?;
            if !host.is_empty() {
                return Err(DeviceError::Invalid("the run takes memory from the driver and reads the host's"));
            }
            done.counts.left += 1;
        } else if kind == cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET {
            done.counts.left += 1;
        }
    }
    Ok(done)
}

fn copy_of(context: &Arc<Context>, node: cu::CUgraphNode, host: &mut Vec<Pinned>) -> Result<Option<Work>, DeviceError> {
    use cu::CUmemorytype as M;
    let mut p = MaybeUninit::<cu::CUDA_MEMCPY3D>::zeroed();
    // SAFETY: the node is a copy; the driver fills the whole struct.
    check("cuGraphMemcpyNodeGetParams", unsafe { cu::cuGraphMemcpyNodeGetParams(node, p.as_mut_ptr()) })?;
    // SAFETY: the driver has filled it, its enums with values of their own.
    let p = unsafe { p.assume_init() };
    let flat = p.Height <= 1
        && p.Depth <= 1
        && [p.srcY, p.srcZ, p.srcLOD, p.dstY, p.dstZ, p.dstLOD].iter().all(|&zero| zero == 0);
    let on_device = |kind| kind == M::CU_MEMORYTYPE_DEVICE || kind == M::CU_MEMORYTYPE_UNIFIED;
    if !flat || !on_device(p.dstMemoryType) || p.WidthInBytes == 0 {
        return Ok(None);
    }
    let (len, to) = (p.WidthInBytes, p.dstDevice + p.dstXInBytes as u64);
    if on_device(p.srcMemoryType) {
        return Ok(Some(Work::Copy { to, from: p.srcDevice + p.srcXInBytes as u64, len }));
    }
    if p.srcMemoryType != M::CU_MEMORYTYPE_HOST {
        return Ok(None);
    }
    let own = Pinned::new(context, len.next_multiple_of(16))?;
    let from = p.srcHost.cast::<u8>().wrapping_add(p.srcXInBytes);
    // SAFETY: whoever queued the copy has just now promised that so many bytes can be read there; ours were just made.
    unsafe { ptr::copy_nonoverlapping(from, own.as_ptr(), len) };
    let from = own.as_ptr().expose_provenance() as u64;
    host.push(own);
    Ok(Some(Work::Copy { to, from, len }))
}

fn fill_of(node: cu::CUgraphNode) -> Result<Option<Work>, DeviceError> {
    let mut p = MaybeUninit::<cu::CUDA_MEMSET_NODE_PARAMS>::zeroed();
    // SAFETY: the node is a fill; the driver fills the whole struct.
    check("cuGraphMemsetNodeGetParams", unsafe { cu::cuGraphMemsetNodeGetParams(node, p.as_mut_ptr()) })?;
    // SAFETY: all of its fields are integers.
    let p = unsafe { p.assume_init() };
    if p.height > 1 || p.width == 0 {
        return Ok(None);
    }
    let value = match p.elementSize {
        1 => (p.value & 0xff) * 0x0101_0101,
        2 => (p.value & 0xffff) * 0x0001_0001,
        4 => p.value,
        _ => return Ok(None),
    };
    let len = p.width * usize::try_from(p.elementSize).unwrap_or(1);
    let words = p.dst.is_multiple_of(4) && len.is_multiple_of(4);
    let bytes_are_equal = value.to_le_bytes().windows(2).all(|pair| pair[0] == pair[1]);
    Ok((words || bytes_are_equal).then_some(Work::Fill { to: p.dst, value, len, words }))
}

/// Puts a kernel in a node's place.
fn replace(graph: cu::CUgraph, node: cu::CUgraphNode, kernels: &Kernels, work: Work) -> Result<(), DeviceError> {
    let (before, after) = (neighbours(node, true)?, neighbours(node, false)?);
    // SAFETY: the nodes are the graph's, and the work is what the node would have done.
    let kernel = unsafe { kernels.add(work, graph, &before) }?;
    let from = vec![kernel; after.len()];
    // SAFETY: both tables have the length said, of nodes of the graph; edges carry no data.
    let tied = unsafe { cu::cuGraphAddDependencies_v2(graph, from.as_ptr(), after.as_ptr(), ptr::null(), after.len()) };
    check("cuGraphAddDependencies", tied)?;
    // SAFETY: the node is the graph's and not used any more; its edges go with it.
    check("cuGraphDestroyNode", unsafe { cu::cuGraphDestroyNode(node) })
}

fn neighbours(node: cu::CUgraphNode, before: bool) -> Result<Vec<cu::CUgraphNode>, DeviceError> {
    let ask = |table: *mut cu::CUgraphNode, edges: *mut cu::CUgraphEdgeData, count: *mut usize| {
        let result = if before {
            // SAFETY: the node is the graph's; the tables have room for `count` entries, or there are none.
            unsafe { cu::cuGraphNodeGetDependencies_v2(node, table, edges, count) }
        } else {
            // SAFETY: as above.
            unsafe { cu::cuGraphNodeGetDependentNodes_v2(node, table, edges, count) }
        };
        check("cuGraphNodeGetDependencies", result)
    };
    let mut count = 0;
    ask(ptr::null_mut(), ptr::null_mut(), &raw mut count)?;
    let mut nodes = vec![ptr::null_mut(); count];
    let mut edges = vec![MaybeUninit::<cu::CUgraphEdgeData>::zeroed(); count];
    if count > 0 {
        ask(nodes.as_mut_ptr(), edges.as_mut_ptr().cast(), &raw mut count)?;
    }
    nodes.truncate(count);
    Ok(nodes)
}
