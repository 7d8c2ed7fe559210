//! Reads one value after the other and collects what is wrong with each.

use std::{collections::BTreeSet, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use config::{Config, Map, Value};
use faaswap_protocol::Bytes;

use super::ConfigError;

/// Reads keys and remembers which were asked for.
pub(super) struct Reader {
    table: Map<String, Value>,
    prefix: String,
    known: BTreeSet<String>,
    mistakes: Vec<String>,
}

impl Reader {
    pub(super) fn new(config: &Config) -> Self {
        let table = config.cache.clone().into_table().unwrap_or_default();
        Self::of_table(table, String::new())
    }

    pub(super) fn of_table(table: Map<String, Value>, prefix: String) -> Self {
        Self { table, prefix, known: BTreeSet::new(), mistakes: Vec::new() }
    }

    pub(super) fn mistake(&mut self, what: impl std::fmt::Display) {
        self.mistakes.push(format!("{}{what}", self.prefix));
    }

    pub(super) fn take_mistakes(&mut self, other: Self) {
        self.mistakes.extend(other.mistakes);
    }

    /// One mistake per key of the file that nobody asked for.
    pub(super) fn refuse_unknown(&mut self, file: &Config, also: &[&str]) {
        let found = file.cache.clone().into_table().unwrap_or_default();
        self.refuse_keys(found.into_keys().collect(), also);
    }

    pub(super) fn refuse_unknown_in(&mut self, also: &[&str]) {
        self.refuse_keys(self.table.keys().cloned().collect(), also);
    }

    fn refuse_keys(&mut self, mut keys: Vec<String>, also: &[&str]) {
        keys.sort();
        for key in keys {
            if !self.known.contains(&key) && !also.contains(&key.as_str()) {
                let known: Vec<_> = self.known.iter().map(String::as_str).collect();
                let known = known.join(", ");
                self.mistake(format!("{key} is no setting; there are: {known}"));
            }
        }
    }

    pub(super) fn finish<T>(self, value: T) -> Result<T, ConfigError> {
        if self.mistakes.is_empty() { Ok(value) } else { Err(ConfigError(self.mistakes)) }
    }

    fn parse<T>(&mut self, key: &str, default: T, parse: impl FnOnce(&str) -> Result<T, String>) -> T {
        self.known.insert(key.to_owned());
        let Some(value) = self.table.get(key) else { return default };
        let parsed = value.clone().into_string().map_err(|_| "a text or number is expected".to_owned());
        match parsed.and_then(|text| parse(text.trim())) {
            Ok(value) => value,
            Err(why) => {
                self.mistake(format!("{key}: {why}"));
                default
            }
        }
    }

    pub(super) fn text(&mut self, key: &str, default: &str) -> String {
        self.parse(key, default.to_owned(), |text| match text {
            "" => Err("must not be empty".to_owned()),
            text => Ok(text.to_owned()),
        })
    }

    pub(super) fn path(&mut self, key: &str, default: &str) -> PathBuf {
        PathBuf::from(self.text(key, default))
    }

    /// A path; `off` or nothing for none.
    pub(super) fn optional_path(&mut self, key: &str) -> Option<PathBuf> {
        self.parse(key, None, |text| Ok(Some(text).filter(|text| !matches!(*text, "" | "off")).map(PathBuf::from)))
    }

    /// An address; `off` or nothing for none.
    pub(super) fn address(&mut self, key: &str, default: Option<&str>) -> Option<SocketAddr> {
        self.parse(key, default.and_then(|text| text.parse().ok()), |text| match text {
            "" | "off" => Ok(None),
            text => text.parse().map(Some).map_err(|_| format!("`{text}` is no address such as 0.0.0.0:9470, nor off")),
        })
    }

    pub(super) fn mode(&mut self, key: &str, default: u32) -> u32 {
        self.parse(key, default, |text| {
            let mode = u32::from_str_radix(text.trim_start_matches("0o"), 8).ok().filter(|mode| *mode <= 0o777);
            mode.ok_or_else(|| format!("`{text}` is no mode such as \"0660\""))
        })
    }

    pub(super) fn bytes(&mut self, key: &str, default: Bytes) -> Bytes {
        self.parse(key, default, parse_bytes)
    }

    pub(super) fn optional_bytes(&mut self, key: &str) -> Option<Bytes> {
        self.parse(key, None, |text| parse_bytes(text).map(Some))
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, default: T, words: &[(&str, T)]) -> T {
        self.parse(key, default, |text| {
            let found = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
            let all = || words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            found.ok_or_else(|| format!("`{text}` is none of: {}", all()))
        })
    }

    pub(super) fn duration(&mut self, key: &str, default: Duration) -> Duration {
        self.parse(key, default, parse_duration)
    }

    pub(super) fn count(&mut self, key: &str, default: usize, allowed: RangeInclusive<usize>) -> usize {
        self.parse(key, default, |text| parse_count(text, &allowed))
    }

    pub(super) fn optional_count(&mut self, key: &str, allowed: RangeInclusive<usize>) -> Option<usize> {
        self.parse(key, None, |text| parse_count(text, &allowed).map(Some))
    }
}

fn parse_count(text: &str, allowed: &RangeInclusive<usize>) -> Result<usize, String> {
    let found = text.parse().ok().filter(|n| allowed.contains(n));
    found.ok_or_else(|| format!("`{text}` is no number from {} to {}", allowed.start(), allowed.end()))
}

/// `512`, `24MiB`, `1.5 GiB`.
pub(super) fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("B", 0), ("", 0)];
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..at], text[at..].trim());
    let shift = units.iter().find(|(name, _)| *name == unit).map(|(_, shift)| *shift);
    let whole = number.split_once('.').map_or((number, ""), |parts| parts);
    let bytes = shift.and_then(|shift| scaled(whole, shift));
    bytes.map(Bytes::new).ok_or_else(|| format!("`{text}` is no size such as 512KiB, 24MiB or 1.5GiB"))
}

/// `digits.decimals` times two to the power of `shift`.
fn scaled((digits, decimals): (&str, &str), shift: u32) -> Option<u64> {
    const DECIMALS_MAX: usize = 6;
    let whole = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if decimals.is_empty() {
        return Some(whole);
    }
    let places = u32::try_from(decimals.len().min(DECIMALS_MAX)).ok()?;
    let part: u64 = decimals.get(..decimals.len().min(DECIMALS_MAX))?.parse().ok()?;
    whole.checked_add(u64::try_from((u128::from(part) << shift) / 10_u128.pow(places)).ok()?)
}

/// `250ms`, `30s`, `5m`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number = text[..at].parse::<u64>().ok();
    let millis = match (number, text[at..].trim()) {
        (Some(n), "ms") => Some(n),
        (Some(n), "s") => n.checked_mul(1000),
        (Some(n), "m") => n.checked_mul(60_000),
        (Some(n), "h") => n.checked_mul(3_600_000),
        (Some(_), _) | (None, _) => None,
    };
    millis.map(Duration::from_millis).ok_or_else(|| format!("`{text}` is no time such as 250ms, 30s or 5m"))
}
