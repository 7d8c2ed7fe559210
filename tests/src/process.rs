//! Real processes that cannot outlive the test: logs in a file, killed when dropped or when we are told to stop.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::{Result, Trouble};

/// How often something that says nothing by itself is looked at.
pub const POLL_EVERY: Duration = Duration::from_millis(10);
/// Lines of a log that are shown when something went wrong.
const LOG_LINES_SHOWN: usize = 40;
/// How much programs log is for whoever starts the tests to say.
const LOG: &str = "FAASWAP_LOG";
/// What shells report for a program that Ctrl-C has ended.
const EXIT_INTERRUPTED: i32 = 130;

/// The processes that run now.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
/// The folders that exist as long as this program.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Pid>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process of ours.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program. It inherits no `FAASWAP_` variable but that about its log; its output goes to `<name>.log` in the folder, behind what
    /// an earlier process of that name has written.
    pub fn start(name: &str, program: &Path, folder: &Path, arrange: impl FnOnce(&mut Command)) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        let is_setting = |key: &OsStr| key.to_string_lossy().starts_with("FAASWAP_") && key != LOG;
        for (key, _) in std::env::vars_os().filter(|(key, _)| is_setting(key)) {
            command.env_remove(key);
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        arrange(&mut command);
        // The lock is held while it starts, so that a signal between start and note does not miss it.
        let mut running = running();
        let child =
            command.spawn().map_err(Trouble::while_doing(format_args!("{} cannot start", program.display())))?;
        running.push(Pid::from_child(&child));
        drop(running);
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its number.
    pub fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.id(), signal).map_err(|e| Trouble::new(format!("{} cannot be signalled: {e}", self.name)))
    }

    /// Kills it at once (`kill -9`) and waits for its end.
    pub fn kill(&mut self) {
        // Both fail only where it has ended already.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
        self.forget();
    }

    fn forget(&self) {
        running().retain(|pid| *pid != self.id());
    }

    /// Its exit status, where it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        if status.is_some() {
            self.forget();
        }
        status
    }

    /// Waits for its end.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(&what, within, || Ok(self.ended()))
    }

    /// Waits until `look` finds what it looks for; gives up at once when the process ends.
    pub fn wait_for<T>(&mut self, what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
        let found = wait_for(what, within, || match look() {
            Some(found) => Ok(Some(found)),
            None => match self.ended() {
                Some(status) => Err(Trouble::new(format!("it ended: {status}"))),
                None => Ok(None),
            },
        });
        found.map_err(|error| Trouble::new(format!("{}: {error}\n{}", self.name, self.log_tail())))
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
        format!("--- log of {} ---\n{}\n---", self.name, lines.get(from..).unwrap_or_default().join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
    }
}

/// A folder that goes when it is dropped, or when a signal ends this program.
pub fn temporary_folder(within: &Path) -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("faaswap-").tempdir_in(within);
    let folder = made.map_err(Trouble::while_doing(within.display()))?;
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner).push(folder.path().to_owned());
    Ok(folder)
}

/// Asks until there is an answer, within a limit.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > within {
            return Err(Trouble::new(format!("waited {within:?} for {what} in vain")));
        }
        thread::sleep(POLL_EVERY);
    }
}

/// From now on Ctrl-C and SIGTERM end this program together with all processes that it has started.
pub fn end_together() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        // Held for good: nothing more is started.
        let running = running();
        for pid in running.iter() {
            let _ended = kill_process(*pid, Signal::KILL);
        }
        for folder in FOLDERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Most are gone already, and nobody is left to be told of the others.
            let _gone = fs::remove_dir_all(folder);
        }
        eprintln!("\ninterrupted; {} processes ended", running.len());
        std::process::exit(EXIT_INTERRUPTED);
    })?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let sleeper = Process::start("sleeper", Path::new("/bin/sleep"), folder.path(), |c| {
            c.arg("600");
        });
        let pid = sleeper.unwrap().id();
        assert!(rustix::process::test_kill_process(pid).is_err(), "it still runs");
    }

    #[test]
    fn a_process_that_ends_instead_of_getting_ready_is_reported_with_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Process::start("sh", Path::new("/bin/sh"), folder.path(), |c| {
            c.args(["-c", "echo no luck; exit 3"]);
        })
        .unwrap();
        let error = process.wait_for("luck", Duration::from_secs(30), || None::<()>).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no luck"), "{error}");
    }
}
