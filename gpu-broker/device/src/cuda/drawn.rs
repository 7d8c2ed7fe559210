//! Captured graphs before they are instantiated: what their nodes do, copies of them, and nodes that do it elsewhere.

use std::{
    collections::HashMap,
    ffi::{CStr, c_ulonglong, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::sys as cu;

use super::{
    driver::{Context, check, tell},
    queue::Event,
};
use crate::DeviceError;

/// Most arguments of a kernel.
const ARGUMENTS_MAX: usize = 4096;
/// As many bytes of arguments as CUDA allows.
const ARGUMENT_BYTES_MAX: usize = 32_764;
/// Keys in a launch's list of extras: the end, the arguments in one piece, and where their size is.
const EXTRA_END: usize = 0;
const EXTRA_BUFFER: usize = 1;
const EXTRA_SIZE: usize = 2;
const EXTRAS_MAX: usize = 4;
/// What kernels need that are made of the same plan.
const NEEDS: [cu::CUfunction_attribute; 6] = [
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS,
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES,
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
    cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION,
];
/// So much of a kernel's name is told.
const NAME_TOLD: usize = 120;

/// Held while a graph is copied or goes. The driver wants calls for one graph one after the other, and does not say whether the end of a
/// copy reaches into what it was copied from, or into another copy. A process was ended once by its allocator, which had seen a double
/// free, about when 480 programs went at once, on a thread each: supposed, not seen, to be this.
static COPIES: Mutex<()> = Mutex::new(());

/// A graph that can be read and changed. What is launched is made of it, and needs it no more but to be changed itself.
pub(super) struct Drawn {
    context: Arc<Context>,
    raw: usize,
}

/// What a node does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Kernel(Call),
    /// Waits for the event of this handle.
    Wait(usize),
    Empty,
    /// What cannot be made to do the same elsewhere, and why not.
    Other(&'static str),
}

/// A kernel's launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Function or kernel; one of the two is 0.
    function: [usize; 2],
    /// Blocks, threads, and shared memory.
    shape: [u32; 7],
    /// Each argument's bytes; all of them as one where they are `packed`.
    pub(super) arguments: Vec<Vec<u8>>,
    /// Whether it was launched with its arguments in one piece, as the driver does not tell them apart.
    packed: bool,
}

impl Node {
    /// Whether the other is the same kernel, where either is one.
    pub(super) fn runs_the_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kernel(one), Self::Kernel(other)) => one.function == other.function,
            (Self::Kernel(_), _) | (_, Self::Kernel(_)) => false,
            (Self::Wait(_) | Self::Empty | Self::Other(_), _) => true,
        }
    }
}

/// All that a graph says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) nodes: Vec<Node>,
    /// Which node is behind which, by their places in `nodes`.
    pub(super) edges: Vec<(usize, usize)>,
}

impl Call {
    /// How the other is another kernel, or launched in another way, or with another number of arguments; `None` where it is not.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        let launch = |call: &Self| (call.shape, call.packed, call.arguments.len());
        if self.function != other.function && !self.is_made_alike(other) {
            return Some(format!("another kernel: {} and {}", self.name(), other.name()));
        }
        let (a, b) = (launch(self), launch(other));
        (a != b).then(|| format!("{} is launched in another way: {a:?} and {b:?}", self.name()))
    }

    /// Whether two kernels were made apart of the same plan, as cuDNN does for each session: they have the same name, which says the
    /// plan, and need the same. In models of one kind they are at the same place of the same graph.
    fn is_made_alike(&self, other: &Self) -> bool {
        let needs = |call: &Self| NEEDS.map(|what| call.attribute(what));
        let (one, two) = (needs(self), needs(other));
        one == two
            && one.iter().all(Option::is_some)
            && self.full_name().is_some_and(|name| other.full_name() == Some(name))
    }

    fn attribute(&self, what: cu::CUfunction_attribute) -> Option<i32> {
        let [function, _] = self.function;
        if function == 0 {
            return None;
        }
        let mut value = 0;
        // SAFETY: the handle is that of a function that is loaded; the driver writes a number.
        let told = unsafe { cu::cuFuncGetAttribute(&raw mut value, what, ptr::with_exposed_provenance_mut(function)) };
        (told == cu::CUresult::CUDA_SUCCESS).then_some(value)
    }

    /// Does something with the launch as the driver wants it told: each argument's place has as many bytes as the argument, and all of it is
    /// there until `work` returns.
    fn with<T>(&mut self, work: impl FnOnce(*const cu::CUDA_KERNEL_NODE_PARAMS) -> T) -> T {
        let mut places: Vec<*mut c_void> = self.arguments.iter_mut().map(|bytes| bytes.as_mut_ptr().cast()).collect();
        let mut size = self.arguments.first().map_or(0, Vec::len);
        let mut extra = [
            ptr::without_provenance_mut(EXTRA_BUFFER),
            places.first().copied().unwrap_or(ptr::null_mut()),
            ptr::without_provenance_mut(EXTRA_SIZE),
            ptr::from_mut(&mut size).cast(),
            ptr::without_provenance_mut(EXTRA_END),
        ];
        let [grid_x, grid_y, grid_z, block_x, block_y, block_z, shared] = self.shape;
        let parameters = cu::CUDA_KERNEL_NODE_PARAMS {
            func: ptr::with_exposed_provenance_mut(self.function[0]),
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: shared,
            kernelParams: if self.packed { ptr::null_mut() } else { places.as_mut_ptr() },
            extra: if self.packed { extra.as_mut_ptr() } else { ptr::null_mut() },
            kern: ptr::with_exposed_provenance_mut(self.function[1]),
            ctx: ptr::null_mut(),
        };
        work(&raw const parameters)
    }

    /// What the kernel is called, for messages.
    pub(super) fn name(&self) -> String {
        let name = self.full_name().map(|name| name.to_string_lossy().chars().take(NAME_TOLD).collect());
        name.unwrap_or_else(|| "a kernel without a name".to_owned())
    }

    fn full_name(&self) -> Option<&CStr> {
        let [function, kernel] = self.function;
        let mut name = ptr::null();
        let told = if function == 0 {
            // SAFETY: the handle is that of a kernel that is loaded; the driver writes where its name is.
            unsafe { cu::cuKernelGetName(&raw mut name, ptr::with_exposed_provenance_mut(kernel)) }
        } else {
            // SAFETY: as above.
            unsafe { cu::cuFuncGetName(&raw mut name, ptr::with_exposed_provenance_mut(function)) }
        };
        // SAFETY: the name ends with zero, and lives as long as its module, which is loaded as long as there are programs of it.
        (told == cu::CUresult::CUDA_SUCCESS && !name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
    }
}

impl Drawn {
    /// Takes a graph over.
    ///
    /// # Safety
    /// The handle must be that of a graph of this context, which nobody else destroys.
    pub(super) unsafe fn own(context: &Arc<Context>, raw: cu::CUgraph) -> Self {
        Self { context: Arc::clone(context), raw: raw.expose_provenance() }
    }

    pub(super) fn raw(&self) -> cu::CUgraph {
        ptr::with_exposed_provenance_mut(self.raw)
    }

    /// The handles of its nodes.
    pub(super) fn nodes(&self) -> Result<Vec<cu::CUgraphNode>, DeviceError> {
        let mut count = 0;
        // SAFETY: without a table the driver writes the number of nodes alone.
        check("cuGraphGetNodes", unsafe { cu::cuGraphGetNodes(self.raw(), ptr::null_mut(), &raw mut count) })?;
        let mut nodes = vec![ptr::null_mut(); count];
        // The driver refuses a table without room.
        if count > 0 {
            // SAFETY: the table has room for as many nodes as the driver has said.
            let result = unsafe { cu::cuGraphGetNodes(self.raw(), nodes.as_mut_ptr(), &raw mut count) };
            check("cuGraphGetNodes", result)?;
        }
        Ok(nodes)
    }

    /// Reads what it says.
    pub(super) fn read(&self) -> Result<Content, DeviceError> {
        self.context.enter()?;
        let handles = self.nodes()?;
        let places: HashMap<_, _> = handles.iter().enumerate().map(|(place, node)| (node.addr(), place)).collect();
        let mut count = 0;
        // SAFETY: without tables the driver writes the number of edges alone.
        let asked = unsafe {
            let none = ptr::null_mut();
            cu::cuGraphGetEdges_v2(self.raw(), none, none, ptr::null_mut(), &raw mut count)
        };
        check("cuGraphGetEdges", asked)?;
        let (mut from, mut to) = (vec![ptr::null_mut(); count], vec![ptr::null_mut(); count]);
        let mut data = vec![MaybeUninit::<cu::CUgraphEdgeData>::zeroed(); count];
        if count > 0 {
            // SAFETY: all tables have room for as many edges as the driver has said.
            let asked = unsafe {
                let data = data.as_mut_ptr().cast();
                cu::cuGraphGetEdges_v2(self.raw(), from.as_mut_ptr(), to.as_mut_ptr(), data, &raw mut count)
            };
            check("cuGraphGetEdges", asked)?;
        }
        let place = |node: &cu::CUgraphNode| places.get(&node.addr()).copied();
        let edges = from.iter().zip(&to).map(|(from, to)| Some((place(from)?, place(to)?))).collect::<Option<_>>();
        let edges = edges.ok_or(DeviceError::Invalid("an edge of a graph to a node that it does not have"))?;
        Ok(Content { nodes: handles.into_iter().map(read_node).collect::<Result<_, _>>()?, edges })
    }

    /// Another that says the same, for one who changes it or has it for long.
    pub(super) fn copy(&self) -> Result<Self, DeviceError> {
        self.context.enter()?;
        let mut raw = ptr::null_mut();
        let _alone = COPIES.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the graph is alive; the driver writes a handle, which is ours.
        check("cuGraphClone", unsafe { cu::cuGraphClone(&raw mut raw, self.raw()) })?;
        // SAFETY: as above.
        Ok(unsafe { Self::own(&self.context, raw) })
    }

    /// The node that is in this copy what `node` is in the graph that it is a copy of.
    pub(super) fn copied(&self, node: cu::CUgraphNode) -> Result<cu::CUgraphNode, DeviceError> {
        let mut copied = ptr::null_mut();
        // SAFETY: both are alive; the driver writes a handle, and refuses a graph that is no copy of the node's.
        check("cuGraphNodeFindInClone", unsafe { cu::cuGraphNodeFindInClone(&raw mut copied, node, self.raw()) })?;
        Ok(copied)
    }

    /// What can be launched.
    pub(super) fn instantiate(&self) -> Result<cu::CUgraphExec, DeviceError> {
        let mut raw = ptr::null_mut();
        let flags: c_ulonglong = 0;
        // SAFETY: the graph is alive; the driver writes a handle, which is the caller's.
        let made = unsafe { cu::cuGraphInstantiateWithFlags(&raw mut raw, self.raw(), flags) };
        check("cuGraphInstantiate", made).map(|()| raw)
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            let _alone = COPIES.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the graph is ours and not used any more; what was instantiated stands by itself.
            tell("cuGraphDestroy", unsafe { cu::cuGraphDestroy(self.raw()) });
        }
    }
}

pub(super) fn kind_of(node: cu::CUgraphNode) -> Result<cu::CUgraphNodeType, DeviceError> {
    let mut kind = cu::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    // SAFETY: the node is one of a graph that is alive; the driver writes its kind.
    check("cuGraphNodeGetType", unsafe { cu::cuGraphNodeGetType(node, &raw mut kind) })?;
    Ok(kind)
}

pub(super) fn read_node(node: cu::CUgraphNode) -> Result<Node, DeviceError> {
    use cu::CUgraphNodeType as T;
    let kind = kind_of(node)?;
    if kind == T::CU_GRAPH_NODE_TYPE_EMPTY {
        return Ok(Node::Empty);
    }
    if kind == T::CU_GRAPH_NODE_TYPE_WAIT_EVENT {
        let mut event = ptr::null_mut();
        // SAFETY: the node waits for an event; the driver writes its handle.
        check("cuGraphEventWaitNodeGetEvent", unsafe { cu::cuGraphEventWaitNodeGetEvent(node, &raw mut event) })?;
        return Ok(Node::Wait(event.addr()));
    }
    if kind != T::CU_GRAPH_NODE_TYPE_KERNEL {
        return Ok(Node::Other("it is neither a kernel nor a wait"));
    }
    let p = parameters(node)?;
    let shape = [p.gridDimX, p.gridDimY, p.gridDimZ, p.blockDimX, p.blockDimY, p.blockDimZ, p.sharedMemBytes];
    let function = [p.func.addr(), p.kern.addr()];
    if p.kernelParams.is_null() {
        // SAFETY: the node is alive, and what it was launched with is its own.
        let bytes = unsafe { packed_arguments(p.extra) };
        return Ok(match bytes {
            Some(bytes) => Node::Kernel(Call { function, shape, arguments: vec![bytes], packed: true }),
            None => Node::Other("a kernel whose arguments are nowhere"),
        });
    }
    let mut arguments = Vec::new();
    while let Some(size) = argument_size(&p, arguments.len())? {
        // SAFETY: the function has an argument of this number, so the node has a place for it in its table.
        let place = unsafe { p.kernelParams.add(arguments.len()) };
        // SAFETY: as above.
        let bytes = unsafe { *place }.cast::<u8>();
        // SAFETY: the argument has this size, and its bytes are the node's.
        arguments.push(unsafe { std::slice::from_raw_parts(bytes, size) }.to_vec());
    }
    if arguments.is_empty() {
        return Ok(Node::Other("a kernel whose arguments the driver does not tell"));
    }
    Ok(Node::Kernel(Call { function, shape, arguments, packed: false }))
}

/// Arguments in one piece, as a launch's list of extras names them; `None` where it does not.
///
/// # Safety
/// The list must be a node's: pairs of a key and a value up to the end's key, or null.
unsafe fn packed_arguments(extra: *mut *mut c_void) -> Option<Vec<u8>> {
    let (mut buffer, mut size) = (ptr::null(), None);
    let mut pair = extra;
    for _ in 0..EXTRAS_MAX {
        // SAFETY: the list goes on, for its end was not seen yet.
        let key = unsafe { pair.as_ref() }?.addr();
        if key == EXTRA_END {
            break;
        }
        // SAFETY: there is a value behind each key but the end's.
        let place = unsafe { pair.add(1) };
        // SAFETY: as above.
        let value = unsafe { *place };
        match key {
            EXTRA_BUFFER => buffer = value.cast::<u8>(),
            // SAFETY: the value of this key is where the size is.
            EXTRA_SIZE => size = unsafe { value.cast::<usize>().as_ref() }.copied(),
            _ => return None,
        }
        // SAFETY: the next pair, or the end.
        pair = unsafe { pair.add(2) };
    }
    let size = size.filter(|&size| size > 0 && size <= ARGUMENT_BYTES_MAX && !buffer.is_null())?;
    // SAFETY: the node was launched with so many bytes there, which are its own by now.
    Some(unsafe { std::slice::from_raw_parts(buffer, size) }.to_vec())
}

fn parameters(node: cu::CUgraphNode) -> Result<cu::CUDA_KERNEL_NODE_PARAMS, DeviceError> {
    let mut p = MaybeUninit::<cu::CUDA_KERNEL_NODE_PARAMS>::zeroed();
    // SAFETY: the node is a kernel; the driver fills the whole struct. What it points to is the node's.
    check("cuGraphKernelNodeGetParams", unsafe { cu::cuGraphKernelNodeGetParams_v2(node, p.as_mut_ptr()) })?;
    // SAFETY: the driver has filled it; its fields are numbers and addresses.
    Ok(unsafe { p.assume_init() })
}

/// The size of a kernel's argument; `None` where it has no such argument.
fn argument_size(p: &cu::CUDA_KERNEL_NODE_PARAMS, index: usize) -> Result<Option<usize>, DeviceError> {
    let (mut offset, mut size) = (0, 0);
    let result = if p.func.is_null() {
        // SAFETY: the kernel is that of a node; the driver writes two numbers, or says that there is no such argument.
        unsafe { cu::cuKernelGetParamInfo(p.kern, index, &raw mut offset, &raw mut size) }
    } else {
        // SAFETY: as above.
        unsafe { cu::cuFuncGetParamInfo(p.func, index, &raw mut offset, &raw mut size) }
    };
    if result == cu::CUresult::CUDA_ERROR_INVALID_VALUE {
        return Ok(None);
    }
    if index >= ARGUMENTS_MAX {
        return Err(DeviceError::Invalid("a kernel of so many arguments cannot be"));
    }
    check("cuFuncGetParamInfo", result).map(|()| Some(size))
}

/// Gives a kernel of a graph that was instantiated other arguments, of the same sizes, from its next launch on.
///
/// # Safety
/// The node must be a kernel of the graph that it was made of, which is alive and which nobody else uses meanwhile, and the call
/// that node's. Whenever it is launched, what the arguments name must be there.
pub(super) unsafe fn set_in(exec: cu::CUgraphExec, node: usize, call: &mut Call) -> Result<(), DeviceError> {
    let node = ptr::with_exposed_provenance_mut(node);
    // SAFETY: the launch is told whole, and the driver copies it before it returns; the rest is the caller's promise.
    let set = call.with(|parameters| unsafe { cu::cuGraphExecKernelNodeSetParams_v2(exec, node, parameters) });
    check("cuGraphExecKernelNodeSetParams", set)
}

/// Gives a kernel of a graph other arguments, of the same sizes, for what is instantiated of it from now on.
///
/// # Safety
/// The node must be a kernel of a graph that is alive and that nobody else uses meanwhile, and the call that node's. Whenever what is
/// instantiated of it is launched, what the arguments name must be there.
pub(super) unsafe fn set(node: usize, call: &mut Call) -> Result<(), DeviceError> {
    let node = ptr::with_exposed_provenance_mut(node);
    // SAFETY: as above.
    let set = call.with(|parameters| unsafe { cu::cuGraphKernelNodeSetParams_v2(node, parameters) });
    check("cuGraphKernelNodeSetParams", set)
}

/// Lets a wait of a graph be for another event, in what is instantiated of it from now on.
///
/// # Safety
/// The node must be a wait of a graph that is alive and that nobody else uses meanwhile.
pub(super) unsafe fn set_event(node: usize, event: &Event) -> Result<(), DeviceError> {
    let node = ptr::with_exposed_provenance_mut(node);
    // SAFETY: the caller's promise; the event is alive.
    check("cuGraphEventWaitNodeSetEvent", unsafe { cu::cuGraphEventWaitNodeSetEvent(node, event.raw()) })
}

/// Lets a wait of a graph that was instantiated be for another event, from its next launch on.
///
/// # Safety
/// The node must be a wait of the graph that it was made of, which is alive and which nobody else uses meanwhile.
pub(super) unsafe fn set_event_in(exec: cu::CUgraphExec, node: usize, event: &Event) -> Result<(), DeviceError> {
    let node = ptr::with_exposed_provenance_mut(node);
    // SAFETY: the caller's promise; the event is alive.
    let set = unsafe { cu::cuGraphExecEventWaitNodeSetEvent(exec, node, event.raw()) };
    check("cuGraphExecEventWaitNodeSetEvent", set)
}
