//! What twins launch. All twins of a kind in a lane share it, for a lane runs one program at a time: before each part is launched it is set
//! to the twin that runs, and to where its weights are. That is words of kernels' arguments, some 0.5 us for each kernel on an H100, and
//! the events that it waits for; what comes behind the first part is set while that runs, and while weights are copied.
//!
//! So a function costs no graph of its own. One takes some 6 KB of the host's memory for each kernel and 3 KB of the device's, and 2 KB of
//! the host's for what it was made of (driver 580.159.04).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering},
};

use cudarc::driver::sys as cu;

use super::{
    Template,
    alike::{Differs, LANE, Place, Places, WEIGHTS, WORD, Word},
};
use crate::{
    DeviceError, RangeId,
    cuda::{
        CudaDevice,
        drawn::{self, Call, Drawn, Node},
        placement::Placement,
        queue::{Event, Graph},
        rewrite::Counts,
    },
};

/// A twin: whose places its kind's kernels shall name.
pub(in crate::cuda) struct Twin {
    /// Tells twins of a kind apart.
    number: u64,
    places: Places,
    /// Of its weights, by group.
    events: Vec<Arc<Event>>,
    /// The range that it moves with; `None` where it finds its weights at the range's own addresses.
    moves_with: Option<RangeId>,
    executable: Arc<Mutex<Executable>>,
    /// Keeps what no other may have meanwhile.
    _template: Arc<Template>,
}

/// A copy of a template's graphs, that can be launched.
pub(in crate::cuda) struct Executable {
    pub(in crate::cuda) parts: Vec<Part>,
}

/// A copy of one of its graphs, that can be changed.
struct Copied {
    drawn: Drawn,
    /// In the template's order.
    nodes: Vec<cu::CUgraphNode>,
    groups: u32,
    counts: Counts,
}

/// A part of an executable.
pub(in crate::cuda) struct Part {
    pub(in crate::cuda) graph: Graph,
    /// How many groups of the weights it waits for.
    pub(in crate::cuda) groups: u32,
    kernels: Vec<Kernel>,
    /// Which nodes wait, and for which group.
    waits: Vec<(usize, u32)>,
    /// What it is set to; `None` after it could not be set.
    set: Option<Setting>,
    /// What it was made of, whose nodes these are.
    _drawn: Drawn,
}

/// Which twin, and where its weights are by the placement's number; 0 where that does not matter.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Setting {
    twin: u64,
    placement: u64,
}

/// A kernel that is not the same for all twins.
struct Kernel {
    node: usize,
    call: Call,
    /// Words of its arguments that name what is a twin's own.
    words: Vec<Word>,
    reads_weights: bool,
}

impl Twin {
    /// What it launches. For whoever has its lane, who is alone with it.
    pub(in crate::cuda) fn executable(&self) -> MutexGuard<'_, Executable> {
        self.executable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The range that it moves with.
    pub(in crate::cuda) fn moves_with(&self) -> Option<RangeId> {
        self.moves_with
    }

    fn address(&self, place: Place, placed: Option<&Placement>) -> Result<u64, DeviceError> {
        match (placed, place) {
            (Some(placed), (WEIGHTS, offset)) => Ok(placed.address(offset)),
            _ => self.places.address(place),
        }
    }
}

impl Part {
    /// Sees to it that this is the twin's when it is launched next; `placed` tells where the weights are, if they move.
    pub(in crate::cuda) fn set_to(
        &mut self,
        twin: &Twin,
        placed: impl FnOnce() -> Result<Option<Arc<Placement>>, DeviceError>,
    ) -> Result<(), DeviceError> {
        let reads_weights = self.kernels.iter().any(|kernel| kernel.reads_weights);
        let placed = if reads_weights { placed()? } else { None };
        let wanted = Setting { twin: twin.number, placement: placed.as_ref().map_or(0, |placed| placed.number) };
        if self.set == Some(wanted) {
            return Ok(());
        }
        let is_its = self.set.take().is_some_and(|set| set.twin == twin.number);
        for Kernel { node, call, words, .. } in self.kernels.iter_mut().filter(|kernel| kernel.reads_weights || !is_its)
        {
            for word in &*words {
                write(call, word, twin.address(word.place, placed.as_deref())?);
            }
            // SAFETY: the graph was made of the one that is kept, whose node this is, and which nobody else has; weights are where the
            // placement has them, for as long as anything runs that reads them, and the rest stays as long as the twin.
            unsafe { drawn::set_in(self.graph.raw(), *node, call) }?;
        }
        for &(node, group) in self.waits.iter().filter(|_| !is_its) {
            // SAFETY: the same; the twin keeps the event.
            unsafe { drawn::set_event_in(self.graph.raw(), node, event_of(&twin.events, group)?) }?;
        }
        self.set = Some(wanted);
        Ok(())
    }
}

impl Template {
    fn copies(&self) -> Result<Vec<Copied>, DeviceError> {
        let drawing = self.drawing.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = drawing.parts.iter().map(|(original, groups, counts)| {
            let drawn = original.copy()?;
            let nodes = original.nodes()?.into_iter().map(|node| drawn.copied(node)).collect::<Result<_, _>>()?;
            Ok(Copied { drawn, nodes, groups: *groups, counts: *counts })
        });
        parts.collect()
    }

    /// What twins in a lane launch, if there are any.
    fn executable(&self, lane: usize) -> Option<Arc<Mutex<Executable>>> {
        self.executables().get(&lane).and_then(Weak::upgrade)
    }

    /// Keeps what twins in a lane shall launch; returns what they do, for another thread may have been faster.
    fn keep(&self, lane: usize, made: Executable) -> Arc<Mutex<Executable>> {
        let mut known = self.executables();
        known.get(&lane).and_then(Weak::upgrade).unwrap_or_else(|| {
            let made = Arc::new(Mutex::new(made));
            known.insert(lane, Arc::downgrade(&made));
            made
        })
    }

    fn executables(&self) -> MutexGuard<'_, HashMap<usize, Weak<Mutex<Executable>>>> {
        self.executables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a word of a kernel's arguments name an address.
fn write(call: &mut Call, word: &Word, address: u64) {
    call.arguments[word.argument][word.offset..word.offset + WORD].copy_from_slice(&address.to_ne_bytes());
}

impl CudaDevice {
    /// A twin in a lane, with these places; `moves` says whether it moves with the range's weights.
    pub(super) fn twin_of(
        &self,
        template: &Arc<Template>,
        (lane, places): (usize, Places),
        (range, moves): (RangeId, bool),
    ) -> Result<Twin, DeviceError> {
        let number = template.twins.fetch_add(1, Ordering::Relaxed);
        let groups = template.differs.iter().flatten().filter_map(|(_, differs)| match differs {
            Differs::Group(group) => Some(group + 1),
            Differs::Words(_) => None,
        });
        let groups = groups.max().unwrap_or(0);
        let mut books = self.shared.books()?;
        let events: Vec<_> =
            (0..groups).map(|group| books.event(&self.shared.context, range, group)).collect::<Result<_, _>>()?;
        drop(books);
        let executable = match template.executable(lane) {
            Some(executable) => executable,
            None => template.keep(lane, self.executable(template, number, &places, &events)?),
        };
        let moves_with = moves.then_some(range);
        Ok(Twin { number, places, events, moves_with, executable, _template: Arc::clone(template) })
    }

    /// Copies the template's graphs, with a twin's places in them, and brings them to the device.
    fn executable(
        &self,
        template: &Template,
        twin: u64,
        places: &Places,
        events: &[Arc<Event>],
    ) -> Result<Executable, DeviceError> {
        let parts = template.copies()?.into_iter().zip(&template.differs).map(|(copied, differs)| {
            let Copied { drawn, nodes, groups, counts } = copied;
            let (kernels, waits) = change(&nodes, differs, places, events)?;
            let graph = Graph::of(&drawn, counts.of_plain(), &self.uploads)?;
            Ok(Part { graph, groups, kernels, waits, set: Some(Setting { twin, placement: 0 }), _drawn: drawn })
        });
        Ok(Executable { parts: parts.collect::<Result<_, DeviceError>>()? })
    }
}

/// Which kernels are set to twins, and which nodes wait for which group.
type Changed = (Vec<Kernel>, Vec<(usize, u32)>);

/// Has a copy of a part of the template, whose nodes these are, name a twin's places and events.
fn change(
    nodes: &[cu::CUgraphNode],
    differs: &[(usize, Differs)],
    places: &Places,
    events: &[Arc<Event>],
) -> Result<Changed, DeviceError> {
    let (mut kernels, mut waits) = (Vec::new(), Vec::new());
    for (number, differs) in differs {
        let node = nodes[*number].expose_provenance();
        match differs {
            Differs::Words(words) => {
                let Node::Kernel(mut call) = drawn::read_node(nodes[*number])? else {
                    return Err(DeviceError::Invalid("a template's kernel is no kernel"));
                };
                for word in words {
                    write(&mut call, word, places.address(word.place)?);
                }
                // SAFETY: the node is a kernel of the copy, which the caller has alone. What is launched of it is set to a twin before,
                // whose places stay for as long as its program; the lane's stay for as long as the device.
                unsafe { drawn::set(node, &mut call) }?;
                let words: Vec<_> = words.iter().filter(|word| !LANE.contains(&word.place.0)).copied().collect();
                let reads_weights = words.iter().any(|word| word.place.0 == WEIGHTS);
                kernels.extend((!words.is_empty()).then_some(Kernel { node, call, words, reads_weights }));
            }
            Differs::Group(group) => {
                // SAFETY: the node is a wait of the copy, which the caller has alone.
                unsafe { drawn::set_event(node, event_of(events, *group)?) }?;
                waits.push((node, *group));
            }
        }
    }
    Ok((kernels, waits))
}

fn event_of(events: &[Arc<Event>], group: u32) -> Result<&Event, DeviceError> {
    let event = usize::try_from(group).ok().and_then(|group| events.get(group));
    event.map(Arc::as_ref).ok_or(DeviceError::Invalid("a twin has fewer groups than its kind"))
}
