//! Programs: a model's run, captured into graphs, one for each stage of a swap-in that it waits for (`stages.rs`), so that
//! the first is launched before all weights have memory behind their addresses.

use std::{
    cell::RefCell,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    CudaDevice,
    arena::{Purpose, with_purpose},
    drawn::Drawn,
    placement::Placement,
    queue::{Graph, Queue},
    rewrite::Counts,
    stages::stages,
    twins::Twin,
};
use crate::{Device, DeviceError, Group, RangeId};

/// What is usual moves by this part of the difference where a run took longer, and by no more than this part of itself.
const USUAL_FOLLOWS: u32 = 8;

/// A model's run, captured: what to launch, where its inputs and outputs lie.
pub struct Program {
    body: Body,
    lane: usize,
    times: Mutex<Times>,
}

/// What is launched.
enum Body {
    Captured(Vec<Part>),
    Twin(Twin),
}

#[derive(Default)]
struct Times {
    last: RunTimes,
    usual: Usual,
}

/// How long the device takes with the weights there, as far as runs have shown. It follows shorter runs at once and longer ones slowly:
/// who sleeps too long is late, who wakes too early looks a moment longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Usual {
    #[default]
    Unknown,
    /// One alone may have been slow, as when others were being bound beside it.
    Once(Duration),
    Known(Duration),
}

impl Usual {
    fn after(self, took: Duration) -> Self {
        match self {
            Self::Unknown => Self::Once(took),
            Self::Once(first) => Self::Known(took.min(first)),
            Self::Known(usual) => {
                let longer = took.saturating_sub(usual).min(usual);
                Self::Known(took.min(usual + longer / USUAL_FOLLOWS))
            }
        }
    }

    /// For how long nobody need look.
    fn at_least(self) -> Duration {
        match self {
            Self::Unknown | Self::Once(_) => Duration::ZERO,
            Self::Known(usual) => usual,
        }
    }
}

/// A program as it was captured, from which others can be made.
pub struct Drawing {
    /// Each part's graph, the groups that it waits for, and what became of it.
    pub(super) parts: Vec<(Drawn, u32, Counts)>,
    pub(super) lane: usize,
}

impl fmt::Debug for Drawing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drawing").field("parts", &self.parts.len()).field("lane", &self.lane).finish()
    }
}

/// A part of a program: what is launched once so many groups of the weights are queued.
pub(super) struct Part {
    pub(super) graph: Graph,
    pub(super) groups: u32,
}

/// Where the time of a run went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunTimes {
    /// Until its first part was launched.
    pub until_first: Duration,
    /// Until the program was launched: inputs are queued, and the weights' copies are queued and mapped.
    pub until_launch: Duration,
    /// From there to the last output.
    pub after: Duration,
    /// By the device's clock, from before the inputs to behind the outputs.
    pub on_device: Duration,
}

impl Program {
    fn captured(parts: Vec<Part>, lane: usize) -> Self {
        Self { body: Body::Captured(parts), lane, times: Mutex::default() }
    }

    /// One that is made of others of its kind, for this lane.
    pub(super) fn of_twin(twin: Twin, lane: usize) -> Self {
        Self { body: Body::Twin(twin), lane, times: Mutex::default() }
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes where a run's time went, and how long the device took where the weights were there.
    pub(super) fn took(&self, last: RunTimes, device: Option<Duration>) {
        let times = &mut *self.times();
        times.last = last;
        times.usual = device.map_or(times.usual, |took| times.usual.after(took));
    }

    /// Where the time of the last run went.
    pub fn last(&self) -> RunTimes {
        self.times().last
    }

    /// How long the device takes at least, as far as is known.
    pub(super) fn usual(&self) -> Duration {
        self.times().usual.at_least()
    }

    /// Launches its parts, each once `ready` has returned for its number of groups; tells when the first was, if there are any. `placed`
    /// tells where the weights of a range are. For whoever has the lane.
    pub(super) fn launch(
        &self,
        on: &Queue,
        placed: impl Fn(RangeId) -> Result<Arc<Placement>, DeviceError>,
        ready: impl Fn(u32) -> Result<(), DeviceError>,
    ) -> Result<Option<Instant>, DeviceError> {
        let mut first = None;
        let mut launch = |graph: &Graph, groups| {
            ready(groups)?;
            graph.launch(on)?;
            first.get_or_insert_with(Instant::now);
            Ok::<_, DeviceError>(())
        };
        match &self.body {
            Body::Captured(parts) => parts.iter().try_for_each(|part| launch(&part.graph, part.groups))?,
            Body::Twin(twin) => {
                let mut place = None;
                twin.with_parts(|parts| {
                    parts.iter_mut().try_for_each(|part| {
                        part.set_to(twin, || match (&place, twin.moves_with()) {
                            (None, Some(range)) => Ok(Some(Arc::clone(place.insert(placed(range)?)))),
                            (known, _) => Ok(known.clone()),
                        })?;
                        launch(&part.graph, part.groups)
                    })
                })?;
            }
        }
        Ok(first)
    }

    /// Of each part, how many groups it waits for, and what it is made of.
    fn counts(&self) -> Vec<(u32, Counts)> {
        match &self.body {
            Body::Captured(parts) => parts.iter().map(|part| (part.groups, part.graph.counts())).collect(),
            Body::Twin(twin) => twin.counts().to_vec(),
        }
    }

    /// Of how many kernels, copies and waits each part is made, and how many groups it waits for.
    pub fn parts_nodes(&self) -> Vec<(u32, usize)> {
        self.counts().into_iter().map(|(groups, counts)| (groups, counts.nodes)).collect()
    }

    /// In which lane it runs.
    pub fn lane(&self) -> usize {
        self.lane
    }

    /// Copies and fills in it that are kernels of ours, and others that are not.
    pub fn replaced(&self) -> (usize, usize) {
        let all = self.counts();
        let sum = |of: fn(Counts) -> usize| all.iter().map(|(_, counts)| of(*counts)).sum();
        (sum(|part| part.replaced), sum(|part| part.left))
    }

    /// Of how many kernels, copies and waits it is made.
    pub fn nodes(&self) -> usize {
        self.counts().iter().map(|(_, counts)| counts.nodes).sum()
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("lane", &self.lane).finish_non_exhaustive()
    }
}

/// A capture under way on the calling thread.
struct Capture {
    /// The lane whose stream is captured.
    lane: usize,
    /// How many groups each stage of a swap-in makes usable, before it none; the last one has all.
    stages: Vec<u32>,
    /// The stage that the part under way needs.
    stage: usize,
    done: Vec<(Part, Drawn)>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

impl CudaDevice {
    /// Makes a program of what `work` queues on the binding lane's stream, for `lane`, which may be the same: its scratch is
    /// that lane's. It is cut where it waits for a later stage of these groups.
    ///
    /// Fails where `work` keeps scratch for itself: the next program in the lane would overwrite it.
    pub fn capture<E: From<DeviceError>>(
        &self,
        lane: usize,
        binding: usize,
        groups: &[Group],
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(Program, Drawing), E> {
        let (binding_lane, target) = (self.lane(binding)?, self.lane(lane)?);
        self.shared.context.enter()?;
        let _alone = self.capturing.write().unwrap_or_else(PoisonError::into_inner);
        let (peak, workspace) = (binding_lane.scratch().peak(), binding_lane.workspace().mapped());
        // Two arenas of the same history need the same; what another history adds is grown into during the capture.
        target.scratch().grow(peak)?;
        target.workspace().grow(workspace)?;
        let before = target.scratch().live();
        let stages = stages(groups, self.info().chunk);
        let usable = stages.iter().map(|stage| u32::try_from(stage.groups).unwrap_or(u32::MAX));
        // What waits for nothing is a part of its own.
        let stages = std::iter::once(0).chain(usable).collect();
        CAPTURE.set(Some(Capture { lane: binding, stages, stage: 0, done: Vec::new() }));
        let begun = binding_lane.queue.begin_capture();
        let worked = begun.map_err(E::from).and_then(|()| with_purpose(Purpose::Scratch(lane), work));
        let capture = CAPTURE.take();
        let parts = capture.map_or(Ok(Vec::new()), |capture| self.end_part(capture).map(|capture| capture.done));
        worked?;
        let parts = self.shared.noted(parts)?;
        if target.scratch().live() != before {
            return Err(DeviceError::Invalid("the run keeps scratch memory for itself").into());
        }
        let drawn = |(part, drawn): (Part, Drawn)| {
            let told = (drawn, part.groups, part.graph.counts());
            (part, told)
        };
        let (parts, drawn) = parts.into_iter().map(drawn).unzip();
        Ok((Program::captured(parts, lane), Drawing { parts: drawn, lane }))
    }

    /// Ends the part that is captured. One of nothing is left out.
    fn end_part(&self, mut capture: Capture) -> Result<Capture, DeviceError> {
        let (drawn, rewritten) = self.lane(capture.lane)?.queue.end_capture(&self.memory.kernels)?;
        if rewritten.counts.nodes > 0 {
            let groups = capture.stages.get(capture.stage).copied().unwrap_or(0);
            let graph = Graph::of(&drawn, rewritten, &self.uploads)?;
            capture.done.push((Part { graph, groups }, drawn));
        }
        Ok(capture)
    }

    /// What is captured next on this thread waits for this group: a new part begins where it is of a later stage.
    pub(super) fn cut_before(&self, group: u32) -> Result<(), DeviceError> {
        let Some(capture) = CAPTURE.take() else { return Ok(()) };
        let stage =
            capture.stages.partition_point(|&groups| groups <= group).min(capture.stages.len().saturating_sub(1));
        let capture = if stage > capture.stage {
            let lane = capture.lane;
            let ended = self.end_part(capture)?;
            self.lane(lane)?.queue.begin_capture()?;
            Capture { stage, ..ended }
        } else {
            capture
        };
        CAPTURE.set(Some(capture));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual(took_us: &[u64]) -> Duration {
        took_us.iter().fold(Usual::default(), |usual, us| usual.after(Duration::from_micros(*us))).at_least()
    }

    #[test]
    fn a_run_that_was_slow_by_chance_lets_nobody_sleep_as_long() {
        assert_eq!(usual(&[173_000]), Duration::ZERO);
        assert_eq!(usual(&[173_000, 1_000]), Duration::from_millis(1));
        assert_eq!(usual(&[1_000, 1_000, 600_000]), Duration::from_micros(1_125));
    }

    #[test]
    fn it_follows_shorter_runs_at_once_and_longer_ones_slowly() {
        assert_eq!(usual(&[1_000, 1_200, 800]), Duration::from_micros(800));
        assert_eq!(usual(&[1_000, 1_000, 1_080]), Duration::from_micros(1_010));
    }
}
