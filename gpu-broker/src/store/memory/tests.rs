//! The tier with real files: what comes, stays, leaves and fails.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize},
    },
    time::Duration,
};

use tempfile::TempDir;

use super::*;

/// Far longer than anything here takes.
const SOON: Duration = Duration::from_secs(60);
const SIZE: Bytes = Bytes::new(3000);

/// A tier with room for this many models, and a folder for what is on disk.
struct Node {
    dir: TempDir,
    memory: Arc<Memory>,
}

impl Node {
    fn new(room: u64) -> Self {
        Self::with(room, Box::new(|_| {}))
    }

    fn with(room: u64, ready: Ready) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::open(&dir.path().join("memory"), Bytes::new(SIZE.get() * room + 10), ready).unwrap();
        Self { dir, memory }
    }

    /// A registered model of bytes of its own.
    fn home(&self, name: &str) -> Home {
        let from = self.dir.path().join(name);
        fs::write(&from, bytes(name)).unwrap();
        self.memory.home(name, &from, SIZE).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let all = fs::read_dir(self.dir.path().join("memory")).unwrap();
        let mut names: Vec<_> = all.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn bytes(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(usize::try_from(SIZE.get()).unwrap()).collect()
}

/// Waits for the weights and compares them.
fn holds(held: &Held, name: &str) {
    let weights = held.weights().unwrap();
    assert_eq!(weights.wait_filled(weights.len(), SOON), Ok(true));
    assert!(weights.as_slice() == bytes(name), "{name} holds other bytes");
}

/// One swap-in: the weights are copied, and then on a device.
fn swap_in(home: &Home, name: &str) -> Held {
    let mut held = home.hold().unwrap();
    holds(&held, name);
    held.settle();
    until_named(home);
    held
}

/// Files get their name, and figures are complete, just after the last byte is there.
fn until_named(home: &Home) {
    while !home.is_in_memory() {
        thread::yield_now();
    }
}

#[test]
fn models_beyond_the_budget_stay_registered_and_come_back_when_they_are_asked_for() {
    let node = Node::new(2);
    let names = ["a", "b", "c", "d", "e"];
    let homes: Vec<Home> = names.iter().map(|name| node.home(name)).collect();
    for round in 0..4 {
        for (home, name) in homes.iter().zip(names) {
            drop(swap_in(home, name));
            let (used, budget) = node.memory.used();
            assert!(used <= budget && node.files().len() <= 2, "round {round}: {used} in {:?}", node.files());
        }
    }
    let stats = node.memory.stats();
    assert_eq!((stats.fetched, stats.found, stats.evicted), (20, 0, 18), "in this order each was away");
    assert_eq!(stats.read, Bytes::new(20 * SIZE.get()));
}

#[test]
fn who_was_used_last_stays() {
    let node = Node::new(2);
    let [a, b, c] = ["a", "b", "c"].map(|name| node.home(name));
    drop(swap_in(&a, "a"));
    drop(swap_in(&b, "b"));
    drop(swap_in(&a, "a"));
    drop(swap_in(&c, "c"));
    assert_eq!(node.files(), ["a", "c"]);
    assert_eq!(node.memory.stats().found, 1);
}

#[test]
fn who_is_on_a_device_stays_and_leaves_before_anything_is_refused() {
    let node = Node::new(2);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| node.home(name));
    let on_device = swap_in(&a, "a");
    drop(swap_in(&b, "b"));
    let also = swap_in(&c, "c");
    assert_eq!(node.files(), ["a", "c"], "b was used later than a, and is on no device");
    let third = swap_in(&d, "d");
    assert_eq!(node.files(), ["c", "d"], "the device has what it needs");
    drop((on_device, also, third));
    drop(swap_in(&b, "b"));
    assert_eq!(node.memory.used().0, Bytes::new(2 * SIZE.get()));
}

#[test]
fn what_is_being_copied_does_not_leave_and_others_wait_for_it() {
    let node = Node::new(1);
    let [a, b] = ["a", "b"].map(|name| node.home(name));
    let mut copying = a.hold().unwrap();
    holds(&copying, "a");
    let waiting = b.hold().unwrap();
    let weights = waiting.weights().unwrap();
    assert_eq!(weights.wait_filled(1, Duration::from_millis(50)), Ok(false), "there is no room for it yet");
    holds(&copying, "a");
    copying.settle();
    holds(&waiting, "b");
    assert_eq!(node.memory.stats().failed, 0);
}

#[test]
fn swap_ins_of_weights_that_are_on_the_way_follow_them() {
    let (go, going) = (Arc::new(Barrier::new(2)), AtomicBool::new(false));
    let theirs = Arc::clone(&go);
    let ready = Box::new(move |_: &HostWeights| {
        // Once only: `Barrier` would wait for ever for a second one.
        if !going.swap(true, Ordering::SeqCst) {
            theirs.wait();
        }
    });
    let node = Node::with(2, ready);
    let a = node.home("a");
    let (first, second) = (a.hold().unwrap(), a.hold().unwrap());
    assert!(Arc::ptr_eq(&first.weights().unwrap(), &second.weights().unwrap()));
    go.wait();
    holds(&first, "a");
    holds(&second, "a");
    until_named(&a);
    let stats = node.memory.stats();
    assert_eq!((stats.fetched, stats.followed, stats.read), (1, 1, SIZE));
}

#[test]
fn weights_that_are_brought_beforehand_are_found_by_the_swap_in_and_counted_once() {
    let node = Node::new(1);
    let [a, b] = ["a", "b"].map(|name| node.home(name));
    drop(swap_in(&b, "b"));
    let (told, near) = std::sync::mpsc::channel();
    let tell: Near = Box::new(move || told.send(()).unwrap());
    let held = a.bring(tell).unwrap().expect("it was on disk");
    near.recv().unwrap();
    let no_need = || -> Near { Box::new(|| panic!("nothing was brought")) };
    assert!(a.bring(no_need()).unwrap().is_none(), "it is there or on the way");
    let mut copying = a.hold().unwrap();
    drop(held);
    holds(&copying, "a");
    copying.settle();
    until_named(&a);
    let stats = node.memory.stats();
    assert_eq!((stats.fetched, stats.followed, stats.found), (2, 0, 0), "b and a, each from disk");
    drop((copying, swap_in(&a, "a")));
    assert_eq!(node.memory.stats().found, 1, "the next one counts again");
}

#[test]
fn weights_that_cannot_be_read_fail_who_waits_and_are_tried_again() {
    let node = Node::new(2);
    let a = node.home("a");
    let file = node.dir.path().join("a");
    fs::write(&file, [1; 10]).unwrap();
    let held = a.hold().unwrap();
    let weights = held.weights().unwrap();
    let why = weights.wait_filled(1, SOON).unwrap_err();
    assert!(why.to_string().contains("10"), "{why}");
    fs::write(&file, bytes("a")).unwrap();
    let again = a.hold().unwrap();
    holds(&again, "a");
    drop(held);
    assert_eq!(node.memory.stats().failed, 1);
    drop(swap_in(&a, "a"));
    assert_eq!(node.memory.used().0, SIZE, "what failed is not charged");
    assert_eq!(node.files(), ["a"], "and leaves nothing");
}

#[test]
fn a_model_that_could_never_be_in_host_memory_is_refused_and_no_other() {
    let node = Node::new(1);
    let _a = node.home("a");
    let _b = node.home("b");
    let refused = node.memory.home("c", Path::new("c"), Bytes::new(SIZE.get() + 11));
    assert!(matches!(refused, Err(MemoryError::Full { needed: Bytes { .. }, .. })), "{refused:?}");
}

#[test]
fn registering_brings_weights_only_where_nobody_else_has_to_leave() {
    let node = Node::new(2);
    let [a, b, c] = ["a", "b", "c"].map(|name| node.home(name));
    for home in [&a, &b, &c] {
        home.warm().unwrap();
    }
    assert_eq!(node.files(), ["a", "b"]);
    assert!(a.is_in_memory() && !c.is_in_memory());
    assert_eq!(node.memory.stats().failed, 0, "nobody had asked for it");
    drop(a);
    c.warm().unwrap();
    assert_eq!(node.files(), ["b", "c"], "nobody misses what no model is registered with");
    assert_eq!(node.memory.stats().found + node.memory.stats().fetched, 0, "no swap-in was asked for");
}

#[test]
fn weights_outlive_the_process_and_drafts_do_not() {
    let made_ready = Arc::new(AtomicUsize::new(0));
    let node = Node::new(2);
    for name in ["a", "b"] {
        node.home(name).warm().unwrap();
    }
    let folder = node.dir.path().join("memory");
    fs::write(folder.join("x.7.draft"), [0; 10]).unwrap();
    let count = Arc::clone(&made_ready);
    let ready = Box::new(move |_: &HostWeights| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let again = Memory::open(&folder, Bytes::new(2 * SIZE.get()), ready).unwrap();
    assert_eq!((again.used().0, node.files()), (Bytes::new(2 * SIZE.get()), vec!["a".to_owned(), "b".to_owned()]));
    let a = again.home("a", Path::new("/nowhere"), SIZE).unwrap();
    a.warm().unwrap();
    drop(swap_in(&a, "a"));
    assert_eq!((again.stats().read, made_ready.load(Ordering::SeqCst)), (Bytes::ZERO, 1), "nothing was read from disk");
    let less = Memory::open(&folder, SIZE, Box::new(|_| {})).unwrap();
    assert_eq!(less.used().0, SIZE, "what exceeds a smaller budget goes");
}

#[test]
fn many_swap_ins_at_once_always_see_their_own_bytes() {
    let node = Node::new(4);
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let homes: Vec<Home> = names.iter().map(|name| node.home(name)).collect();
    thread::scope(|scope| {
        for start in 0..3 {
            let homes = &homes;
            scope.spawn(move || {
                for step in 0..60 {
                    let i = (start * 2 + step * (start + 1)) % names.len();
                    let mut held = homes[i].hold().unwrap();
                    holds(&held, names[i]);
                    held.settle();
                }
            });
        }
    });
    let (used, budget) = node.memory.used();
    let stats = node.memory.stats();
    assert!(used <= budget);
    assert_eq!((stats.failed, stats.found + stats.followed + stats.fetched), (0, 180));
}
