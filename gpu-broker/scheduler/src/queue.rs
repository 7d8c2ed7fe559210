//! Waiting requests: one queue per function, and the order in which functions are due.

use std::collections::{BTreeMap, BTreeSet};

use faaswap_protocol::{Late, Priority, Slo};

use crate::event::{FunctionKey, ModelId, Moment, RequestKey};

/// A function and what waits for it.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) model: ModelId,
    #[expect(
        dead_code,
        reason = "the scheduling issue orders classes by the objective; the deadline is in the request"
    )]
    pub(crate) slo: Slo,
    pub(crate) priority: Priority,
    pub(crate) late: Late,
    waiting: BTreeSet<(Moment, RequestKey)>,
}

/// All functions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    functions: BTreeMap<FunctionKey, Function>,
    /// Functions with something waiting, by priority, then by when their most urgent request is due.
    due: BTreeSet<(Priority, Moment, FunctionKey)>,
    /// Waiting requests that are to be refused when their deadline passes.
    refusable: BTreeSet<(Moment, RequestKey, FunctionKey)>,
    waiting_len: usize,
}

impl Queues {
    pub(crate) fn add(&mut self, key: FunctionKey, model: ModelId, slo: Slo, priority: Priority, late: Late) {
        self.functions.entry(key).or_insert(Function { model, slo, priority, late, waiting: BTreeSet::new() });
    }

    /// Forgets a function and gives back what waited for it.
    pub(crate) fn remove(&mut self, key: FunctionKey) -> Vec<RequestKey> {
        let Some(function) = self.functions.get(&key) else { return Vec::new() };
        let waiting: Vec<_> = function.waiting.iter().copied().collect();
        for &(deadline, request) in &waiting {
            self.take(key, deadline, request);
        }
        self.functions.remove(&key);
        waiting.into_iter().map(|(_, request)| request).collect()
    }

    pub(crate) fn get(&self, key: FunctionKey) -> Option<&Function> {
        self.functions.get(&key)
    }

    pub(crate) fn waiting_for(&self, key: FunctionKey) -> usize {
        self.functions.get(&key).map_or(0, |function| function.waiting.len())
    }

    pub(crate) fn waiting_len(&self) -> usize {
        self.waiting_len
    }

    pub(crate) fn push(&mut self, key: FunctionKey, deadline: Moment, request: RequestKey) {
        self.change(key, |function| function.waiting.insert((deadline, request)));
        if self.functions.get(&key).is_some_and(|function| function.late == Late::Refuse) {
            self.refusable.insert((deadline, request, key));
        }
    }

    /// Takes a request out of its queue.
    pub(crate) fn take(&mut self, key: FunctionKey, deadline: Moment, request: RequestKey) {
        self.change(key, |function| function.waiting.remove(&(deadline, request)));
        self.refusable.remove(&(deadline, request, key));
    }

    /// Functions with something waiting and their most urgent request, most urgent function first.
    pub(crate) fn due(&self) -> impl Iterator<Item = (FunctionKey, &Function, Moment, RequestKey)> {
        self.due.iter().filter_map(|&(_, _, key)| {
            let function = self.functions.get(&key)?;
            let &(deadline, request) = function.waiting.first()?;
            Some((key, function, deadline, request))
        })
    }

    /// Everything that waits, with the model that it waits for.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (ModelId, FunctionKey, Moment, RequestKey)> {
        self.functions.iter().flat_map(|(key, function)| {
            function.waiting.iter().map(|&(deadline, request)| (function.model, *key, deadline, request))
        })
    }

    /// The next request to be refused for being late, and when.
    pub(crate) fn next_refusable(&self) -> Option<(Moment, RequestKey, FunctionKey)> {
        self.refusable.first().copied()
    }

    /// Changes one function's queue and keeps `due` and the count in step with it.
    fn change(&mut self, key: FunctionKey, change: impl FnOnce(&mut Function) -> bool) {
        let Some(function) = self.functions.get_mut(&key) else { return };
        let before = function.waiting.first().map(|&(deadline, _)| (function.priority, deadline, key));
        let len = function.waiting.len();
        change(function);
        let after = function.waiting.first().map(|&(deadline, _)| (function.priority, deadline, key));
        self.waiting_len = self.waiting_len + function.waiting.len() - len;
        if before != after {
            before.map(|entry| self.due.remove(&entry));
            after.map(|entry| self.due.insert(entry));
        }
    }
}
