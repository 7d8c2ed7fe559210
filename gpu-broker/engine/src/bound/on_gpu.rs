//! How a model is bound to a GPU: by a program of its own, or by one of its kind, or by a session that is kept.

use std::sync::Arc;

use faaswap_device::{
    Device, DeviceError, Group, RangeId,
    cuda::{COMPARED_MAX, KindKey, Origin, Template},
};
use ort::session::Session;

use super::{Bound, home::Home, shapes::Shapes};
use crate::{
    EngineError, Prepared, Runtime, Target,
    kind::Kind,
    program::{self, IoLayout, Made, Programs},
    raw::Weights,
};

/// Why a session is kept where the program is not one of its kind.
const KERNELS_GO: &str = "some of its kernels are made for its session, and go with it";

/// A session that a program was captured of, and that nobody runs any more. Kernels may have been made for it, or for the thread that
/// ran it.
struct Ran {
    session: Option<Session>,
    /// Goes after the session.
    _supplied: Vec<Weights>,
    device: Arc<dyn Device>,
    key: Option<KindKey>,
    /// Goes last: kernels may have been made for that thread.
    _home: Arc<Home>,
}

impl Drop for Ran {
    fn drop(&mut self) {
        if let Some(cuda) = self.device.as_cuda() {
            if let Some(key) = &self.key {
                cuda.forget_gone(key);
            }
            // What it has on the device goes; the addresses of the weights are in the program by now.
            cuda.beside_captures(|| self.session = None);
        }
    }
}

impl Bound {
    /// Binds to a program of the model's kind in a lane, without a session; false where that cannot be.
    pub(super) fn bind_by_kind(
        &mut self,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
        lane: usize,
    ) -> Result<bool, EngineError> {
        let (Some(cuda), Some(kind), Some(range)) = (device.as_cuda(), prepared.kind()?, self.range()) else {
            return Ok(false);
        };
        let (Some(template), Ok(io)) = (cuda.template(&kind.key), IoLayout::of(&self.manifest.signature)) else {
            return Ok(false);
        };
        match self.twin(prepared, device, &template, io, (lane, range)) {
            Ok(programs) => {
                (self.programs, self.is_twin) = (Some(programs), true);
                Ok(true)
            }
            Err(error) => {
                tracing::warn!(%error, "a model cannot be bound by its kind");
                Ok(false)
            }
        }
    }

    /// Binds by a session, on a thread that can stay: to a program of it, or of the kind that is learnt from it, or to itself.
    pub(super) fn bind_by_session(
        &mut self,
        (runtime, prepared): (&Runtime, &Prepared),
        target: Target,
        (device, home): (&Arc<dyn Device>, &Arc<Home>),
        (lane, learns): (usize, bool),
    ) -> Result<(), EngineError> {
        let origin = self.make_program((runtime, prepared), target, (device, home), lane)?;
        let is_of_kind = learns
            && self.learn_kind(runtime, prepared, device).unwrap_or_else(|error| {
                tracing::warn!(%error, "a model's weights are mapped at each swap-in: its kind cannot be learnt");
                false
            });
        self.keep_or_let_go(origin.filter(|_| !is_of_kind), learns);
        // Sessions without a program run in lanes.
        let was_captured_here = self.session.is_some() && self.programs.is_some();
        self.home = was_captured_here.then(|| Arc::clone(home));
        Ok(())
    }

    /// Makes a program of a session on a binding lane of the GPU; where that cannot be, a session that stays, in a lane. Tells what
    /// a program was captured of.
    fn make_program(
        &mut self,
        (runtime, prepared): (&Runtime, &Prepared),
        target: Target,
        (device, home): (&Arc<dyn Device>, &Arc<Home>),
        lane: usize,
    ) -> Result<Option<Origin>, EngineError> {
        let cuda = device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
        let range = self.range();
        let io = IoLayout::of(&self.manifest.signature);
        let kind = prepared.kind()?;
        if let Some(kind) = kind {
            let (key, own) = (&kind.key[..4], kind.table.len());
            tracing::debug!(?key, own, lane, "a model is bound by a session, not by its kind");
        }
        let made = io.and_then(|io| {
            let constants = cuda.constants();
            let made = cuda.bind(range, |binding| {
                let stream = cuda.stream(binding)?;
                let place = |kind: &Kind| cuda.beside_captures(|| cuda.place_constants(&constants, &kind.bytes));
                let own = kind.map(|kind| place(kind).map(|base| (kind, base))).transpose()?;
                cuda.for_constants(&constants, || {
                    cuda.beside_captures(|| self.make_session(runtime, prepared, (target, Some(stream)), own))
                })?;
                let session = self.session.as_ref().ok_or(DeviceError::Invalid("a session that was just made"))?;
                let here = (lane, cuda.io_address(lane, io.end)?);
                let there = cuda.io_address(binding, io.end)?;
                let alone = cuda.alone_in(binding)?;
                program::make(device, &self.made_of(session), io, here, (&alone, there), Some(constants))
            });
            made.map_err(|error: EngineError| error.to_string())
        });
        self.kept.clone_from(&self.manifest.keep_session);
        match made {
            Ok((programs, drawing)) => {
                let origin = self.kept.is_none().then(|| self.take_origin((device, home), kind));
                if let (Some(origin), Some(kind), Some(range)) = (&origin, kind, range)
                    && let Some(constants) = programs.constants()
                    && let Err(error) = cuda.note_kind(kind.key, (drawing, origin), range, constants)
                {
                    tracing::info!(%error, "models of a kind are bound one by one");
                }
                self.programs = Some(programs);
                Ok(origin)
            }
            Err(why) => {
                tracing::info!(%why, "a model runs without a program");
                cuda.beside_captures(|| self.session = None);
                self.kept = Some(why);
                self.lane = Some(lane);
                let open = IoLayout::of(&self.manifest.signature).is_err() && self.range.is_some();
                self.shapes = open.then(Shapes::default);
                let constants = cuda.constants();
                let stream = cuda.stream(lane)?;
                cuda.for_constants(&constants, || {
                    cuda.beside_captures(|| self.make_session(runtime, prepared, (target, Some(stream)), None))
                })?;
                self.constants = Some(constants);
                Ok(None)
            }
        }
    }

    /// Takes the session, which is not run any more.
    fn take_origin(&mut self, (device, home): (&Arc<dyn Device>, &Arc<Home>), kind: Option<&Kind>) -> Origin {
        let (session, supplied) = (self.session.take(), std::mem::take(&mut self.supplied));
        let (device, key, home) = (Arc::clone(device), kind.map(|kind| kind.key), Arc::clone(home));
        Arc::new(Ran { session, _supplied: supplied, device, key, _home: home })
    }

    /// Keeps what the program was captured of, or lets it go; `serves` says whether the program is to answer.
    fn keep_or_let_go(&mut self, origin: Option<Origin>, serves: bool) {
        if serves && self.manifest.kernels_go && origin.is_some() {
            self.kept = Some(KERNELS_GO.to_owned());
        }
        self.origin = origin.filter(|_| self.manifest.kernels_go || !serves);
    }

    /// What a program of this session needs to be known of the model.
    pub(super) fn made_of<'s>(&'s self, session: &'s Session) -> Made<'s> {
        Made {
            session,
            signature: &self.manifest.signature,
            input_names: &self.input_names,
            output_names: &self.output_names,
            groups: &self.groups,
        }
    }

    /// Has the model's kind learnt from a second program where it is not known yet, and puts a program of the kind, which moves with
    /// the weights, in the place of the session's. Whether there is such a program now.
    fn learn_kind(
        &mut self,
        runtime: &Runtime,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
    ) -> Result<bool, EngineError> {
        let (Some(cuda), Some(kind), Some(range)) = (device.as_cuda(), prepared.kind()?, self.range()) else {
            return Ok(false);
        };
        let Some(programs) = self.programs.as_ref().filter(|_| self.kept.is_none()) else {
            return Ok(false);
        };
        // Those that are compared stay, and what they were captured of.
        let mut others = Vec::new();
        for _ in 0..COMPARED_MAX {
            if cuda.knows_kind(&kind.key) == Some(false) {
                others.push(Self::bind(runtime, prepared, device, false)?);
            }
        }
        let Some(template) = cuda.template(&kind.key) else { return Ok(false) };
        self.programs = Some(self.twin(prepared, device, &template, programs.io.clone(), (programs.lane(), range))?);
        Ok(true)
    }

    /// A program of the model's kind.
    fn twin(
        &self,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
        template: &Arc<Template>,
        io: IoLayout,
        place: (usize, RangeId),
    ) -> Result<Programs, EngineError> {
        let first = prepared.kind()?.map_or(&[][..], |kind| &kind.bytes);
        let tensors = self.manifest.initializers.iter();
        let tensors: Vec<_> = tensors.map(|tensor| Group { offset: tensor.offset, len: tensor.len }).collect();
        Ok(Programs::twin(device, template, io, place, (&tensors, first))?)
    }
}
