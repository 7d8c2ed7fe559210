//! Twins: programs that are made of another model's of the same kind, without a session.
//!
//! Models of one kind differ in their weights alone. Their programs are the same kernels in the same order; what differs is
//! where things lie. Two programs that were captured, at two ranges and in two lanes, tell which words are such places: those
//! that differ, and that lie as far into the same stretch of either. A third program is the first with these words for its own
//! stretches. Twins of a kind in a lane share what they launch, which is set to the one that runs ([`executable`]). A kind is left alone where
//! anything else differs that could be an address ([`alike`]).

mod alike;
mod executable;
mod known;

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

pub use self::known::KINDS_MAX;
use self::{
    alike::{Differs, OWN_CONSTANTS, Places, WEIGHTS, Word, compare},
    executable::Shelf,
    known::Known,
};
pub(super) use self::{executable::Twin, known::Kinds};
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
/// Constants of one model beyond this are not copied.
const CONSTANTS_COPIED_MAX: usize = 16 << 20;

/// What all models of a kind have in common, as their owner hashed it.
pub type KindKey = [u8; 32];
/// What a program was captured of: as long as this, there are the kernels that libraries have made for it.
pub type Origin = Arc<dyn Any + Send + Sync>;

/// A captured program and all that it is about.
struct Captured {
    origin: Weak<dyn Any + Send + Sync>,
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
    /// What its kernels go with, where that is so: twins keep it.
    origin: Option<Weak<dyn Any + Send + Sync>>,
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

impl Captured {
    /// Whether they have no addresses in common, so that what differs between them tells all that is theirs.
    fn is_apart_from(&self, other: &Self) -> bool {
        !self.places.overlaps(&other.places, self.drawing.lane == other.drawing.lane)
    }

    /// Whether both run the very same kernels: then these are the libraries' own, and go with no session.
    fn shares_kernels_with(&self, other: &Self) -> bool {
        let nodes = |captured: &Self| captured.content.iter().map(|content| content.nodes.len()).collect::<Vec<_>>();
        let mut pairs = self.content.iter().zip(&other.content).flat_map(|(a, b)| a.nodes.iter().zip(&b.nodes));
        nodes(self) == nodes(other) && pairs.all(|(a, b)| a.runs_the_same(b))
    }
}

impl Template {
    fn of(captured: Captured, mut differs: Vec<Vec<(usize, Differs)>>, shares_kernels: bool) -> Self {
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
        let Captured { origin, drawing, lane_has, events, .. } = captured;
        let origin = (!shares_kernels).then_some(origin);
        let counts = drawing.parts.iter().map(|(_, groups, counts)| (*groups, *counts)).collect();
        let (drawing, shelves, twins) = (Mutex::new(drawing), Mutex::default(), AtomicU64::new(0));
        Self { origin, drawing, differs, constants, lane_has, counts, _events: events, shelves, twins }
    }

    /// What a twin has to keep.
    fn kept_by_twins(&self) -> Result<Option<Origin>, DeviceError> {
        let gone = DeviceError::Invalid("the kernels of a kind have gone with the session that they were made for");
        self.origin.as_ref().map(|origin| origin.upgrade().ok_or(gone)).transpose()
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
            Some(known) if known.has_gone() => None,
            Some(Known::Template(template)) => Some(Arc::clone(template)),
            Some(Known::One(..) | Known::Apart(_)) | None => None,
        })
    }

    /// Whether programs of this kind run kernels that go with a session; `None` where that was not seen.
    pub fn kernels_go(&self, key: &KindKey) -> Option<bool> {
        self.kinds.as_ref()?.with(key, |known| match known {
            Some(Known::Template(template)) => Some(template.origin.is_some()),
            Some(Known::One(..) | Known::Apart(_)) | None => None,
        })
    }

    /// Forgets what is known of a kind if what its kernels go with has gone: to be called before they do.
    pub fn forget_gone(&self, key: &KindKey) {
        let forgotten = self.kinds.as_ref().and_then(|kinds| kinds.take_if(key, Known::has_gone));
        drop(forgotten);
    }

    /// Whether twins of this kind can be made; `None` where they never can.
    pub(super) fn knows(&self, key: &KindKey) -> Option<bool> {
        self.kinds.as_ref()?.with(key, |known| match known {
            Some(known) if known.has_gone() => Some(false),
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

    /// Takes note of a program that was captured, while what it was captured of is there: of the first of a kind as it is, of the
    /// second to compare them.
    pub fn note_kind(
        &self,
        key: KindKey,
        (drawing, origin): (Drawing, &Origin),
        range: RangeId,
        constants: &Constants,
    ) -> Result<(), DeviceError> {
        let Some(kinds) = &self.kinds else { return Ok(()) };
        self.forget_gone(&key);
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
        let captured = match self.captured((drawing, origin), range, constants) {
            Ok(captured) => captured,
            Err(error) => {
                kinds.keep(key, Known::Apart(error.to_string()));
                return Err(error);
            }
        };
        let known = kinds.with(&key, |known| known.map(|known| std::mem::replace(known, Known::Apart(String::new()))));
        // Kernels are asked for what they are, so they stay meanwhile.
        let first_origin = match &known {
            Some(Known::One(first, _)) => first.origin.upgrade(),
            Some(Known::Template(_) | Known::Apart(_)) | None => None,
        };
        let next = match known {
            None => Known::One(Box::new(captured), 0),
            Some(Known::One(..)) if first_origin.is_none() => Known::One(Box::new(captured), 0),
            Some(Known::One(first, tried)) if other_lane(first.drawing.lane) && first.is_apart_from(&captured) => {
                self.compared((first, tried), captured)
            }
            // Another thread was faster, or the first model is gone and this one is where it was.
            Some(known) => known,
        };
        kinds.keep(key, next);
        Ok(())
    }

    /// What is known of a kind once two of its programs were compared, of which the first had been compared so often in vain.
    fn compared(&self, (first, tried): (Box<Captured>, u32), captured: Captured) -> Known {
        match compare(&first, &captured, &|address| self.shared.context.is_device_memory(address)) {
            Ok(differs) => {
                let shares_kernels = first.shares_kernels_with(&captured);
                tracing::debug!(shares_kernels, "a kind is known");
                Known::Template(Arc::new(Template::of(*first, differs, shares_kernels)))
            }
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
        // Here until nobody is kept from capturing any more: what goes with it, goes then.
        let origin = template.kept_by_twins()?;
        let made = self.beside_captures(|| {
            self.place_constants(constants, first)?;
            for content in &template.constants {
                self.place_constants(constants, content)?;
            }
            let (scratch, workspace) = template.lane_has;
            self.lane(lane)?.scratch().grow(scratch)?;
            self.lane(lane)?.workspace().grow(workspace)?;
            let places = self.places(lane, range, constants)?;
            let twin = self.twin_of((template, origin.clone()), (lane, places), (range, moves))?;
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
        self.shared.noted(self.uploads.write(address as u64, content))?;
        Ok(address)
    }

    fn captured(
        &self,
        (drawing, origin): (Drawing, &Origin),
        range: RangeId,
        constants: &Constants,
    ) -> Result<Captured, DeviceError> {
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
        Ok(Captured { origin: Arc::downgrade(origin), drawing, content, places, events, constants, lane_has })
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
