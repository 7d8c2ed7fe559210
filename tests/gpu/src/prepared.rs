//! Models as a device runs them: prepared once, in each way that there is, by whichever step needs them first.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use faaswap_engine::Prepared;

use crate::{Result, model};

/// Where they lie, in the folder of the models.
pub(crate) const FOLDER: &str = "prepared";
/// Children that prepare at a time.
const PREPARING: usize = 4;

/// All models of a folder by name; what is not prepared yet is prepared now.
pub(crate) fn all(models: &Path) -> Result<Vec<(String, Prepared)>> {
    these(&model::found(models)?, models)
}

/// The same of one.
pub(crate) fn one(models: &Path, name: &str) -> Result<Prepared> {
    let found: Vec<_> = model::found(models)?.into_iter().filter(|(of, _)| of == name).collect();
    let prepared = these(&found, models)?.into_iter().find(|(of, _)| of == name);
    Ok(prepared.ok_or_else(|| format!("{} has no {name} that can be prepared", models.display()))?.1)
}

/// The same of these models, and what else was prepared before.
pub(crate) fn these(wanted: &[(String, PathBuf)], models: &Path) -> Result<Vec<(String, Prepared)>> {
    let folder = models.join(FOLDER);
    fs::create_dir_all(&folder)?;
    let there = best_of(&folder)?;
    let missing: Vec<_> = wanted.iter().filter(|(name, _)| !there.contains_key(name)).cloned().collect();
    if missing.is_empty() {
        return Ok(there.into_iter().collect());
    }
    let start = Instant::now();
    prepare_all(&missing, &folder);
    println!("prepared {} models in {:.0} s", missing.len(), start.elapsed().as_secs_f64());
    Ok(best_of(&folder)?.into_iter().collect())
}

/// Prepares all models in both layouts, some at a time. Convolutions alone have layouts.
pub(crate) fn prepare_all(models: &[(String, PathBuf)], out: &Path) -> Vec<(String, bool, Result<Prepared>)> {
    let jobs: Vec<_> = models
        .iter()
        .flat_map(|(name, path)| [false, true].map(|last| (name.clone(), path.clone(), last)))
        .filter(|(name, _, last)| !(*last && name.starts_with("bert")))
        .collect();
    let next = AtomicUsize::new(0);
    let mut done: Vec<_> = thread::scope(|scope| {
        let work = || {
            let mut mine = Vec::new();
            while let Some((name, path, last)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let start = Instant::now();
                let folder = out.join(format!("{name}-{}", if *last { "nhwc" } else { "nchw" }));
                let prepared = model::prepare(path, &folder, *last);
                let how = prepared.as_ref().map_or_else(ToString::to_string, |prepared| {
                    let m = prepared.manifest();
                    format!(
                        "{} groups, {} awaits, trial {:?} us, difference {:?}, session kept: {:?}, kernels go: {}, bound apart: {:?}",
                        m.groups.len(),
                        m.await_count,
                        m.trial_run_us,
                        m.trial_max_abs_diff,
                        m.keep_session,
                        m.kernels_go,
                        m.bind_apart
                    )
                });
                println!("  {} in {:.1} s: {how}", folder.display(), start.elapsed().as_secs_f64());
                mine.push((name.clone(), *last, prepared));
            }
            mine
        };
        let threads: Vec<_> = (0..PREPARING).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    done.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    done
}

/// The prepared models in a folder, each in its better layout, by name.
fn best_of(folder: &Path) -> Result<BTreeMap<String, Prepared>> {
    let mut best: BTreeMap<String, Prepared> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let full = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (Some((name, _)), Ok(found)) = (full.rsplit_once('-'), Prepared::open(&path)) else { continue };
        let cost = |of: &Prepared| of.manifest().cost();
        if best.get(name).is_none_or(|known| cost(&found) < cost(known)) {
            best.insert(name.to_owned(), found);
        }
    }
    Ok(best)
}
