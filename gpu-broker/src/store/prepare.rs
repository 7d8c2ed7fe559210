//! Prepares models in a child process: the parent's side, and what the child does.
//!
//! The child is this same program with the argument `prepare`: a job as JSON on its standard input, the outcome as one
//! line of JSON on its standard output. It may die of its limits; that is the model's refusal.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use faaswap_engine::{
    CudaTarget, Manifest, PrepareError, Prepared, Runtime, RuntimeOptions, Target,
    prepare::{
        PrepareJob, PrepareLimits,
        kin::{Kin, ShareJob, Shared, share},
        limit_this_process, run,
    },
};
use faaswap_protocol::{Bytes, Detail, ModelDigest, Refusal};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    sync::Semaphore,
    time::timeout,
};

use super::{Contents, Store};
use crate::limits::{GROUP_BYTES, PREPARE_ANSWER_BYTES_MAX, SHARES_MAX};

/// Memory that preparing takes whatever the model: the runtime's library, its threads, folded constants.
const MEMORY_BASE: u64 = 4 << 30;
/// On a GPU the libraries of CUDA come on top.
const MEMORY_BASE_ON_GPU: u64 = 16 << 30;
/// Variables that the child needs too: where libraries are, and which GPUs there are.
const PASSED_ON: [&str; 4] = ["LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_CACHE_PATH"];
/// Memory per byte of the model: as it came, as it was optimized, flat, bound for the trial.
const MEMORY_PER_BYTE: u64 = 6;
/// Longest end of the child's complaints that is passed on.
const COMPLAINT_BYTES_MAX: usize = 300;

/// What the child is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildJob {
    task: Task,
    on_gpu: bool,
    library: PathBuf,
    limits: ChildLimits,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Task {
    /// Prepare a model by itself.
    Prepare(PrepareJob),
    /// Prepare it by what was prepared for the first of its kind.
    Share(ShareJob),
}

/// The limits that the child sets on itself.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ChildLimits {
    memory: Bytes,
    cpu_time: Duration,
    file_bytes: Bytes,
}

#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Prepared,
    /// It has to be prepared by itself.
    Alone(Shared),
    Refused(Refusal),
}

/// Starts the children, a few at a time.
#[derive(Debug)]
pub struct Preparer {
    program: PathBuf,
    library: PathBuf,
    within: Duration,
    free: Semaphore,
    shares: Semaphore,
}

impl Preparer {
    /// `program` is this broker's own.
    pub fn new(program: PathBuf, library: PathBuf, within: Duration, parallel: usize) -> Self {
        let (free, shares) = (Semaphore::new(parallel), Semaphore::new(SHARES_MAX));
        Self { program, library, within, free, shares }
    }

    /// Prepares an uploaded model for this target, whose prepared models the store is for, unless that was done before.
    /// `started` is called once it is this model's turn.
    pub async fn prepare(
        &self,
        (store, target): (&Store, Target),
        model: &ModelDigest,
        started: impl FnOnce(),
    ) -> Result<(), Refusal> {
        let home = store.prepared_dir(model);
        let contents = store.contents(model).ok_or_else(|| failed("its files are gone"));
        if let Ok(contents) = &contents {
            // What is of a known kind waits for no device, and for nobody who does.
            let _share = self.shares.acquire().await.map_err(|_| Refusal::Draining)?;
            if home.exists()
                || (store.has_kinds() && self.share((store, target), model, contents, false).await?.is_none())
            {
                return Ok(());
            }
        }
        let _turn = self.free.acquire().await.map_err(|_| Refusal::Draining)?;
        if home.exists() {
            return Ok(());
        }
        started();
        let contents = contents?;
        let Some(alone) = self.share((store, target), model, &contents, true).await? else { return Ok(()) };
        let draft = store.draft().map_err(|e| failed(&e.to_string()))?;
        let made = self.best((store.model_dir(model), target), &contents, &draft).await;
        let kept = made.and_then(|made| fs::rename(made, &home).map_err(|e| failed(&e.to_string())));
        // What is left goes at the next start at the latest.
        let _ = fs::remove_dir_all(&draft);
        if let (Ok(()), Shared::Alone { kind, is_first: true, .. }) = (&kept, &alone) {
            let (model_dir, graph_file) = (store.model_dir(model), graph_file(&contents));
            let kin = Kin { model_dir, graph_file, prepared_dir: home };
            if let Err(error) = kin.name(&store.kin_dir(), kind) {
                tracing::warn!(%error, "others of this model's kind are prepared by themselves");
            }
        }
        kept
    }

    /// Prepares the model by its kind; `None` where that was done. What is wrong with a model shows when it is prepared by
    /// itself.
    async fn share(
        &self,
        (store, target): (&Store, Target),
        model: &ModelDigest,
        contents: &Contents,
        may_learn: bool,
    ) -> Result<Option<Shared>, Refusal> {
        let draft = store.draft().map_err(|e| failed(&e.to_string()))?;
        let out_dir = draft.join("shared");
        let job = ShareJob {
            model_dir: store.model_dir(model),
            graph_file: graph_file(contents),
            kin_dir: store.kin_dir(),
            out_dir: out_dir.clone(),
            group_bytes: Bytes::new(GROUP_BYTES),
            may_learn,
        };
        let outcome = self.run_child(&self.job(Task::Share(job), contents, target)).await;
        let home = store.prepared_dir(model);
        let shared = match outcome {
            Ok(Outcome::Prepared) => match Prepared::open(&out_dir) {
                Ok(_) => fs::rename(&out_dir, &home)
                    .map(|()| None)
                    .or_else(|e| if home.exists() { Ok(None) } else { Err(e) }),
                Err(error) => Err(io::Error::other(error.to_string())),
            },
            Ok(Outcome::Alone(alone)) => Ok(Some(alone)),
            Ok(Outcome::Refused(refusal)) | Err(refusal) => Err(io::Error::other(refusal.to_string())),
        };
        // What is left goes at the next start at the latest.
        let _ = fs::remove_dir_all(&draft);
        Ok(shared.unwrap_or_else(|error| {
            tracing::debug!(%error, "a model cannot be prepared by its kind");
            Some(Shared::Alone { kind: String::new(), is_first: false, is_learnable: false })
        }))
    }

    fn job(&self, task: Task, contents: &Contents, target: Target) -> ChildJob {
        let size = contents.size().get();
        let limits = ChildLimits {
            memory: Bytes::new(size.saturating_mul(MEMORY_PER_BYTE).saturating_add(memory_base(target))),
            cpu_time: self.within,
            file_bytes: Bytes::new(size.saturating_mul(2).saturating_add(1 << 30)),
        };
        ChildJob { task, on_gpu: target != Target::Cpu, library: self.library.clone(), limits }
    }

    /// Prepares the model, on a GPU in each layout that may be faster; returns the folder of the best.
    async fn best(
        &self,
        (model, target): (PathBuf, Target),
        contents: &Contents,
        draft: &Path,
    ) -> Result<PathBuf, Refusal> {
        let mut best: Option<(u64, PathBuf)> = None;
        for (number, target) in layouts(target).into_iter().enumerate() {
            let out = draft.join(number.to_string());
            let prepared = self.prepare_for(target, model.clone(), contents, &out).await;
            let manifest = match (prepared, &best) {
                (Ok(manifest), _) => manifest,
                // One that works is enough.
                (Err(refusal), Some(_)) => {
                    tracing::info!(%refusal, "a layout cannot be had");
                    break;
                }
                (Err(refusal), None) => return Err(refusal),
            };
            let cost = manifest.cost();
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, out));
            }
            if !manifest.has_convolutions {
                break;
            }
        }
        best.map(|(_, folder)| folder).ok_or_else(|| failed("there is no target"))
    }

    async fn prepare_for(
        &self,
        target: Target,
        model_dir: PathBuf,
        contents: &Contents,
        out: &Path,
    ) -> Result<Arc<Manifest>, Refusal> {
        fs::create_dir(out).map_err(|e| failed(&e.to_string()))?;
        let (out_dir, group_bytes) = (out.to_owned(), Bytes::new(GROUP_BYTES));
        let job = PrepareJob { model_dir, graph_file: graph_file(contents), out_dir, group_bytes, target };
        let job = self.job(Task::Prepare(job), contents, target);
        let outcome = self.run_child(&job).await;
        let prepared = Prepared::open(out).map(|prepared| Arc::clone(prepared.manifest()));
        match (outcome, prepared) {
            (Ok(Outcome::Prepared), prepared) => prepared.map_err(|e| failed(&e.to_string())),
            // Trying whether a program outlives its session may end the process: the manifest says that it does not.
            (Err(_), Ok(manifest)) if target != Target::Cpu => Ok(manifest),
            (Ok(Outcome::Refused(refusal)) | Err(refusal), _) => Err(refusal),
            (Ok(Outcome::Alone(_)), _) => Err(failed("its process has done something else")),
        }
    }

    async fn run_child(&self, job: &ChildJob) -> Result<Outcome, Refusal> {
        let text = serde_json::to_vec(job).map_err(|e| failed(&e.to_string()))?;
        let passed_on = PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        let mut child = Command::new(&self.program)
            .arg("prepare")
            .env_clear()
            .envs(passed_on)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| failed(&format!("its process cannot be started: {e}")))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let talk = async {
            if let Some(mut stdin) = stdin {
                stdin.write_all(&text).await?;
            }
            let mut answer = Vec::new();
            let mut complaints = Vec::new();
            let (out, err) = tokio::join!(
                async {
                    match stdout {
                        Some(pipe) => pipe.take(PREPARE_ANSWER_BYTES_MAX).read_to_end(&mut answer).await,
                        None => Ok(0),
                    }
                },
                async {
                    match stderr {
                        Some(pipe) => pipe.take(PREPARE_ANSWER_BYTES_MAX).read_to_end(&mut complaints).await,
                        None => Ok(0),
                    }
                }
            );
            out.and(err)?;
            let status = child.wait().await?;
            Ok::<_, io::Error>((status, answer, complaints))
        };
        let (status, answer, complaints) = timeout(self.within, talk)
            .await
            .map_err(|_| failed(&format!("it took longer than {:?}", self.within)))?
            .map_err(|e| failed(&e.to_string()))?;
        if let Ok(outcome) = serde_json::from_slice(&answer) {
            return Ok(outcome);
        }
        let complaints = String::from_utf8_lossy(&complaints);
        let end = complaints.len().saturating_sub(COMPLAINT_BYTES_MAX);
        let end = complaints.ceil_char_boundary(end);
        Err(failed(&format!("its process ended with {status}: {}", complaints[end..].trim())))
    }
}

/// The ways of preparing a model for a target.
fn layouts(target: Target) -> Vec<Target> {
    match target {
        Target::Cpu => vec![Target::Cpu],
        Target::Cuda(cuda) => {
            [false, true].map(|channels_last| Target::Cuda(CudaTarget { channels_last, ..cuda })).to_vec()
        }
    }
}

fn memory_base(target: Target) -> u64 {
    match target {
        Target::Cpu => MEMORY_BASE,
        Target::Cuda(_) => MEMORY_BASE_ON_GPU,
    }
}

fn failed(reason: &str) -> Refusal {
    Refusal::ModelRejected { reason: Detail::from(format!("preparing it failed: {reason}")) }
}

/// What the child does: sets its limits, prepares one model, says how it went.
pub fn child() -> Result<(), String> {
    // Without its broker nobody waits for the outcome.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(|e| e.to_string())?;
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).map_err(|e| e.to_string())?;
    let job: ChildJob = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let ChildLimits { memory, cpu_time, file_bytes } = job.limits;
    let limits = PrepareLimits { memory, on_gpu: job.on_gpu, cpu_time, file_bytes };
    limit_this_process(&limits).map_err(|e| e.to_string())?;
    let outcome = done(&job).unwrap_or_else(|error| Outcome::Refused(error.refusal()));
    println!("{}", serde_json::to_string(&outcome).map_err(|e| e.to_string())?);
    Ok(())
}

fn done(job: &ChildJob) -> Result<Outcome, PrepareError> {
    let runtime = || Runtime::load(&job.library, RuntimeOptions::default());
    match &job.task {
        Task::Prepare(job) => run(&runtime()?, job).map(|_| Outcome::Prepared),
        Task::Share(job) => Ok(match share(runtime, job)? {
            Shared::Prepared => Outcome::Prepared,
            alone @ Shared::Alone { .. } => Outcome::Alone(alone),
        }),
    }
}

fn graph_file(contents: &Contents) -> String {
    contents.files.first().map(|file| file.path.clone()).unwrap_or_default()
}
