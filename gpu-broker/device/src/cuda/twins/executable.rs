//! What twins launch. Twins of a kind in a lane share it, for a lane runs one program at a time: before each part is launched it is set to the
//! twin that runs, and to where its weights are. That is words of kernels' arguments, some 0.5 us for each kernel on an H100, and the
//! events that it waits for; what comes behind the first part is set while that runs, and while weights are copied.
//!
//! So a function costs no graph of its own. One takes some 6 KB of the host's memory for each kernel and 3 KB of the device's, and 2 KB of
//! the host's for what it was made of (driver 580.159.04). There are a few for each lane, so that those that run again and again, with
//! their weights there, seldom have to be set.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering};

use cudarc::driver::sys as cu;

use super::{
    Origin, Template,
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

/// Most executables of a kind in one lane: of 480 functions of eight kinds, whose weights a GPU has a fifth of, about as many are there at a
/// time for each kind and lane.
const EXECUTABLES_MAX: usize = 4;

/// A twin: whose places its kind's kernels shall name.
pub(in crate::cuda) struct Twin {
    /// Tells twins of a kind apart.
    number: u64,
    places: Places,
    /// Of its weights, by group.
    events: Vec<Arc<Event>>,
    /// The range that it moves with; `None` where it finds its weights at the range's own addresses.
    moves_with: Option<RangeId>,
    shelf: Arc<Mutex<Shelf>>,
    /// Keeps what no other may have meanwhile.
    template: Arc<Template>,
    /// Goes last: the kernels go with it.
    _origin: Option<Origin>,
}

/// What the twins of a kind in one lane launch: at least one, once there is a twin.
#[derive(Default)]
pub(super) struct Shelf {
    /// But for the one that is being launched.
    executables: Vec<Executable>,
    /// How many there are, with that one.
    count: usize,
    /// Counts uses.
    now: u64,
}

/// A copy of a template's graphs, that can be launched.
struct Executable {
    parts: Vec<Part>,
    /// The twin that used it last, and when.
    of: u64,
    used: u64,
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
    /// Whether any of them reads weights.
    reads_weights: bool,
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
    /// Does something with the parts that it shall launch, which may take as long as its weights are copied: nobody waits for the shelf
    /// meanwhile. For whoever has its lane.
    pub(in crate::cuda) fn with_parts<T>(
        &self,
        work: impl FnOnce(&mut [Part]) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let taken = lock(&self.shelf).take_for(self.number);
        let mut executable =
            taken.ok_or(DeviceError::Invalid("a kind has nothing to launch in a lane of its twins"))?;
        let done = work(&mut executable.parts);
        lock(&self.shelf).executables.push(executable);
        done
    }

    /// Of each of its parts, how many groups it waits for, and what it is made of.
    pub(in crate::cuda) fn counts(&self) -> &[(u32, Counts)] {
        &self.template.counts
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

impl Shelf {
    /// Takes out the executable that this twin shall launch: its last one, or that which was used the longest time ago.
    fn take_for(&mut self, twin: u64) -> Option<Executable> {
        self.now += 1;
        let had = self.executables.iter().map(|executable| (executable.of, executable.used));
        let mut executable = self.executables.swap_remove(choice(had, twin)?);
        (executable.of, executable.used) = (twin, self.now);
        Some(executable)
    }

    fn has_room(&self) -> bool {
        self.count < EXECUTABLES_MAX
    }

    fn add(&mut self, executable: Executable) {
        if self.has_room() {
            self.executables.push(executable);
            self.count += 1;
        }
    }
}

/// Which executable a twin takes, of those that these twins had last, and when: that which it had itself, or else the oldest.
fn choice(had: impl Iterator<Item = (u64, u64)>, twin: u64) -> Option<usize> {
    had.enumerate().min_by_key(|&(_, (of, used))| (of != twin, used)).map(|(at, _)| at)
}

impl Part {
    /// Sees to it that this is the twin's when it is launched next; `placed` tells where the weights are, if they move.
    pub(in crate::cuda) fn set_to(
        &mut self,
        twin: &Twin,
        placed: impl FnOnce() -> Result<Option<Arc<Placement>>, DeviceError>,
    ) -> Result<(), DeviceError> {
        let placed = if self.reads_weights { placed()? } else { None };
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
            // SAFETY: the graph was made of the one that is kept, whose node this is. It was taken from its shelf, so nobody else has it, and
            // whoever has the lane has waited for what was launched of it before. Weights are where the placement has them, for as long as
            // anything runs that reads them, and the rest stays as long as the twin.
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
        let drawing = lock(&self.drawing);
        let parts = drawing.parts.iter().map(|(original, groups, counts)| {
            let drawn = original.copy()?;
            let nodes = original.nodes()?.into_iter().map(|node| drawn.copied(node)).collect::<Result<_, _>>()?;
            Ok(Copied { drawn, nodes, groups: *groups, counts: *counts })
        });
        parts.collect()
    }

    /// Where what the twins in a lane launch is.
    fn shelf(&self, lane: usize) -> Arc<Mutex<Shelf>> {
        let mut shelves = lock(&self.shelves);
        shelves.get(&lane).and_then(Weak::upgrade).unwrap_or_else(|| {
            let shelf = Arc::new(Mutex::new(Shelf::default()));
            shelves.insert(lane, Arc::downgrade(&shelf));
            shelf
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a word of a kernel's arguments name an address.
fn write(call: &mut Call, word: &Word, address: u64) {
    call.arguments[word.argument][word.offset..word.offset + WORD].copy_from_slice(&address.to_ne_bytes());
}

impl CudaDevice {
    /// A twin in a lane, with these places; `moves` says whether it moves with the range's weights.
    pub(super) fn twin_of(
        &self,
        (template, origin): (&Arc<Template>, Option<Origin>),
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
        let shelf = template.shelf(lane);
        // Nobody waits for what is made: who finds no room has others there.
        let has_room = lock(&shelf).has_room();
        if has_room {
            let made = self.executable(template, number, &places, &events)?;
            lock(&shelf).add(made);
        }
        let moves_with = moves.then_some(range);
        Ok(Twin { number, places, events, moves_with, shelf, template: Arc::clone(template), _origin: origin })
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
            let reads_weights = kernels.iter().any(|kernel| kernel.reads_weights);
            let set = Some(Setting { twin, placement: 0 });
            Ok(Part { graph, groups, kernels, reads_weights, waits, set, _drawn: drawn })
        });
        Ok(Executable { parts: parts.collect::<Result<_, DeviceError>>()?, of: twin, used: 0 })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twin_takes_what_it_had_last_or_else_the_oldest() {
        let had = [(7, 30), (8, 10), (9, 20)];
        assert_eq!(choice(had.into_iter(), 7), Some(0), "its own, though it is the newest");
        assert_eq!(choice(had.into_iter(), 6), Some(1));
        assert_eq!(choice([(7, 30), (9, 0)].into_iter(), 6), Some(1), "never used");
        assert_eq!(choice([].into_iter(), 7), None);
    }
}
