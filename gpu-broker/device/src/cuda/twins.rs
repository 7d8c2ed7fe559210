//! Twins: programs that are made of another model's of the same kind, without a session.
//!
//! Models of one kind differ in their weights alone. Their programs are the same kernels in the same order; what differs is
//! where things lie. Two programs that were captured, at two ranges and in two lanes, tell which words are such places: those
//! that differ, and that lie as far into the same stretch of either. A third program is the first with these words for its own
//! stretches. Twins of a kind in a lane share what they launch, which is set to the one that runs ([`executable`]). A kind is left alone where
//! anything else differs that could be an address ([`alike`]).

mod alike;
mod executable;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

pub(super) use self::executable::Twin;
use self::{
    alike::{Differs, OWN_CONSTANTS, Places, WEIGHTS, Word, compare},
    executable::Shelf,
};
use super::{
    CudaDevice, Stretch,
    drawn::{Content, Node},
    lane::Constants,
    placement::{Span, Tensors},
    program::{Drawing, Program},
    queue::Event,
    rewrite::Counts,
};
use crate::{Device, DeviceError, Group, RangeId};

/// Pairs of programs that are compared until a kind is left alone. What lies between arguments may mislead.
pub const COMPARED_MAX: u32 = 4;
/// Most kinds that are known of a device.
pub const KINDS_MAX: usize = 128;
/// Constants of one model beyond this are not copied.
const CONSTANTS_COPIED_MAX: usize = 16 << 20;

/// What all models of a kind have in common, as their owner hashed it.
pub type KindKey = [u8; 32];

/// A captured program and all that it is about.
struct Captured {
    drawing: Drawing,
    content: Vec<Content>,
    places: Places,
    /// The events of the weights' groups. They stay, so that no other has their handles.
    events: Vec<Arc<Event>>,
    /// What each stretch of constants holds, in the order of `places`.
    constants: Vec<Vec<u8>>,
    /// How much scratch and workspace its lane had.
    lane_has: (usize, usize),
}

/// What twins are made of.
pub struct Template {
    /// Locked by whoever does something with its graphs: the driver wants that, also where they are only copied.
    drawing: Mutex<Drawing>,
    /// By part and node.
    differs: Vec<Vec<(usize, Differs)>>,
    /// What those stretches of constants hold that the program names, but for the first.
    constants: Vec<Vec<u8>>,
    lane_has: (usize, usize),
    /// Of each part, how many groups it waits for, and what it is made of.
    counts: Vec<(u32, Counts)>,
    /// As long as this, no other has these events' handles.
    _events: Vec<Arc<Event>>,
    /// Where what twins launch is, by lane, for as long as there are any in it.
    shelves: Mutex<HashMap<usize, Weak<Mutex<Shelf>>>>,
    /// How many twins there were.
    twins: AtomicU64,
}

enum Known {
    /// The last that was captured, and how many others it and those before it were compared with in vain.
    One(Box<Captured>, u32),
    Template(Arc<Template>),
    /// Its programs differ in more than places, or cannot be kept, for this reason.
    Apart(String),
}

/// The kinds that are known on a device.
#[derive(Default)]
pub(super) struct Kinds(Mutex<Books>);

#[derive(Default)]
struct Books {
    /// Each with the time of its last use.
    known: HashMap<KindKey, (Known, u64)>,
    /// Counts uses.
    now: u64,
}

impl Kinds {
    /// Does something with what is known of a kind, which is the one used last then.
    fn with<T>(&self, key: &KindKey, work: impl FnOnce(Option<&mut Known>) -> T) -> T {
        let Books { known, now } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += 1;
        work(known.get_mut(key).map(|(known, last)| {
            *last = *now;
            known
        }))
    }

    /// Keeps what is known; where there is no room, the kind that was used the longest time ago goes.
    fn keep(&self, key: KindKey, next: Known) {
        let Books { known, now } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += 1;
        if known.len() >= KINDS_MAX && !known.contains_key(&key) {
            let oldest = known.iter().min_by_key(|(_, (_, last))| *last).map(|(key, _)| *key);
            oldest.map(|oldest| known.remove(&oldest));
        }
        known.insert(key, (next, *now));
    }
}

impl Captured {
    /// Whether they have no addresses in common, so that what differs between them tells all that is theirs.
    fn is_apart_from(&self, other: &Self) -> bool {
        !self.places.overlaps(&other.places, self.drawing.lane == other.drawing.lane)
    }
}

impl Template {
    fn of(captured: Captured, mut differs: Vec<Vec<(usize, Differs)>>) -> Self {
        let (mut constants, mut numbers) = (Vec::new(), HashMap::new());
        for (_, differs) in differs.iter_mut().flatten() {
            let Differs::Words(words) = differs else { continue };
            for Word { place: (stretch, _), .. } in words.iter_mut().filter(|word| word.place.0 > OWN_CONSTANTS) {
                *stretch = *numbers.entry(*stretch).or_insert_with(|| {
                    constants.push(captured.constants[*stretch - OWN_CONSTANTS].clone());
                    OWN_CONSTANTS + constants.len()
                });
            }
        }
        let Captured { drawing, lane_has, events, .. } = captured;
        let counts = drawing.parts.iter().map(|(_, groups, counts)| (*groups, *counts)).collect();
        let (drawing, shelves, twins) = (Mutex::new(drawing), Mutex::default(), AtomicU64::new(0));
        Self { drawing, differs, constants, lane_has, counts, _events: events, shelves, twins }
    }

    /// Whether all that it reads of the weights is these tensors'.
    fn reads(&self, tensors: &Tensors) -> bool {
        let words = self.differs.iter().flatten().filter_map(|(_, differs)| match differs {
            Differs::Words(words) => Some(words),
            Differs::Group(_) => None,
        });
        words.flatten().filter(|word| word.place.0 == WEIGHTS).all(|word| tensors.have(word.place.1))
    }
}

impl CudaDevice {
    /// What twins of this kind can be made of, once two models of it were captured.
    pub fn template(&self, key: &KindKey) -> Option<Arc<Template>> {
        self.kinds.as_ref()?.with(key, |known| match known {
            Some(Known::Template(template)) => Some(Arc::clone(template)),
            Some(Known::One(..) | Known::Apart(_)) | None => None,
        })
    }

    /// Whether twins of this kind can be made; `None` where they never can.
    pub(super) fn knows(&self, key: &KindKey) -> Option<bool> {
        self.kinds.as_ref()?.with(key, |known| match known {
            Some(Known::Template(_)) => Some(true),
            Some(Known::One(..)) | None => Some(false),
            Some(Known::Apart(_)) => None,
        })
    }

    /// Why twins of this kind are never made, where that is so.
    pub fn apart(&self, key: &KindKey) -> Option<String> {
        self.kinds.as_ref()?.with(key, |known| match known {
            Some(Known::Apart(why)) => Some(why.clone()),
            Some(Known::One(..) | Known::Template(_)) | None => None,
        })
    }

    /// The lane for the next model, of this kind: they are given out in turn, but a kind is learnt from two of them.
    pub fn next_lane(&self, key: Option<&KindKey>) -> usize {
        let next = || self.next_lane.fetch_add(1, Ordering::Relaxed) % self.lanes();
        let lane = next();
        let is_taken = |kinds: &Kinds, key: &KindKey| {
            kinds.with(key, |known| matches!(known, Some(Known::One(first, _)) if first.drawing.lane == lane))
        };
        match (&self.kinds, key) {
            (Some(kinds), Some(key)) if is_taken(kinds, key) => next(),
            _ => lane,
        }
    }

    /// Takes note of a program that was captured: of the first of a kind as it is, of the second to compare them.
    pub fn note_kind(
        &self,
        key: KindKey,
        drawing: Drawing,
        range: RangeId,
        constants: &Constants,
    ) -> Result<(), DeviceError> {
        let Some(kinds) = &self.kinds else { return Ok(()) };
        let lane = drawing.lane;
        // Two of the same lane would not tell what belongs to it.
        let other_lane = |other: usize| other != lane || self.lanes() == 1;
        let wanted = kinds.with(&key, |known| match known {
            None => true,
            Some(Known::One(first, _)) => other_lane(first.drawing.lane),
            Some(Known::Template(_) | Known::Apart(_)) => false,
        });
        if !wanted {
            return Ok(());
        }
        let captured = match self.captured(drawing, range, constants) {
            Ok(captured) => captured,
            Err(error) => {
                kinds.keep(key, Known::Apart(error.to_string()));
                return Err(error);
            }
        };
        let known = kinds.with(&key, |known| known.map(|known| std::mem::replace(known, Known::Apart(String::new()))));
        let next = match known {
            None => Known::One(Box::new(captured), 0),
            Some(Known::One(first, tried)) if other_lane(first.drawing.lane) && first.is_apart_from(&captured) => {
                match compare(&first, &captured, &|address| self.shared.context.is_device_memory(address)) {
                    Ok(differs) => Known::Template(Arc::new(Template::of(*first, differs))),
                    Err(why) if tried + 1 >= COMPARED_MAX => {
                        tracing::info!(%why, "models of a kind are bound one by one");
                        Known::Apart(why)
                    }
                    Err(why) => {
                        tracing::debug!(why, "two programs of a kind differ; others are tried");
                        Known::One(Box::new(captured), tried + 1)
                    }
                }
            }
            // Another thread was faster, or the first model is gone and this one is where it was.
            Some(known) => known,
        };
        kinds.keep(key, next);
        Ok(())
    }

    /// Makes a program for a lane without capturing it. `constants` become what the kind's are, but for their first stretch,
    /// which holds these bytes. The lane's inputs and outputs must be there, see [`CudaDevice::io_address`]. It moves with the
    /// weights, of which each of `tensors` must lie in a row, where all that it reads of them is theirs.
    pub fn twin(
        &self,
        template: &Arc<Template>,
        lane: usize,
        (range, tensors): (RangeId, &[Group]),
        constants: &Constants,
        first: &[u8],
    ) -> Result<Program, DeviceError> {
        let tensors = Tensors::new(tensors);
        let moves = template.reads(&tensors);
        let made = self.beside_captures(|| {
            self.place_constants(constants, first)?;
            for content in &template.constants {
                self.place_constants(constants, content)?;
            }
            let (scratch, workspace) = template.lane_has;
            self.lane(lane)?.scratch().grow(scratch)?;
            self.lane(lane)?.workspace().grow(workspace)?;
            let places = self.places(lane, range, constants)?;
            let twin = self.twin_of(template, (lane, places), (range, moves))?;
            Ok(Program::of_twin(twin, lane))
        });
        let program = self.shared.noted(made)?;
        if moves {
            let crossing: Arc<[Span]> = tensors.crossing(self.info().chunk.get()).into();
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            (found.whole, found.was) = (Some(crossing), None);
        }
        Ok(program)
    }

    /// Takes memory for constants and writes it.
    pub fn place_constants(&self, constants: &Constants, content: &[u8]) -> Result<usize, DeviceError> {
        let address = self.for_constants(constants, || self.allocate(content.len()))?;
        self.shared.noted(self.shared.context.write(address as u64, content))?;
        Ok(address)
    }

    fn captured(&self, drawing: Drawing, range: RangeId, constants: &Constants) -> Result<Captured, DeviceError> {
        let content = drawing.parts.iter().map(|(drawn, ..)| drawn.read()).collect::<Result<_, _>>()?;
        let places = self.places(drawing.lane, range, constants)?;
        let events = self.shared.books()?.ranges.get(range)?.events.clone();
        let kept = self.memory.kept(constants.owner());
        let most: u64 = kept.iter().map(|(_, len)| len).sum();
        if most > CONSTANTS_COPIED_MAX as u64 {
            return Err(DeviceError::Invalid("its constants are too large to be copied"));
        }
        let read = |&(address, len): &Stretch| {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.beside_captures(|| self.shared.context.read(address, &mut bytes)).map(|()| bytes)
        };
        let constants = self.shared.noted(kept.iter().map(read).collect())?;
        let lane = self.lane(drawing.lane)?;
        let lane_has = (lane.scratch().peak(), lane.workspace().mapped());
        Ok(Captured { drawing, content, places, events, constants, lane_has })
    }

    /// The weights' range, what the lane has, and the constants.
    fn places(&self, lane: usize, range: RangeId, constants: &Constants) -> Result<Places, DeviceError> {
        let weights = {
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            (found.addresses.base(), found.addresses.len() as u64)
        };
        let lane = self.lane(lane)?;
        let mut places = vec![weights, lane.io_stretch()];
        places.extend([lane.scratch().stretch(), lane.workspace().stretch()]);
        places.extend(self.memory.kept(constants.owner()));
        Ok(Places(places))
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.differs.iter().map(Vec::len).sum::<usize>();
        f.debug_struct("Template").field("parts", &self.differs.len()).field("differs", &nodes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{alike::WORD, *};

    #[test]
    fn the_kind_that_was_used_the_longest_time_ago_goes() {
        let kinds = Kinds::default();
        let key = |number: usize| {
            let mut key = KindKey::default();
            key[..WORD].copy_from_slice(&number.to_ne_bytes());
            key
        };
        for number in 0..KINDS_MAX {
            kinds.keep(key(number), Known::Apart(String::new()));
        }
        kinds.with(&key(0), |known| assert!(known.is_some()));
        kinds.keep(key(KINDS_MAX), Known::Apart(String::new()));
        let is_known = |number| kinds.with(&key(number), |known| known.is_some());
        assert!(is_known(0) && !is_known(1) && is_known(KINDS_MAX));
        assert_eq!(kinds.0.lock().expect("nobody panicked").known.len(), KINDS_MAX);
    }
}
