//! Telling the types of files with Google's Magika: its features from a file's bytes, its verdict from its scores.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;

use super::functions::Case;
use crate::{Result, Trouble, cache, oip::Tensor};

/// What comes with the model and says how to speak to it.
#[derive(Debug, Deserialize)]
pub struct Config {
    beg_size: usize,
    end_size: usize,
    block_size: usize,
    padding_token: i32,
    medium_confidence_threshold: f32,
    target_labels_space: Vec<String>,
    thresholds: BTreeMap<String, f32>,
    overwrite_map: BTreeMap<String, String>,
}

/// White space as Python's `bytes.strip` takes it.
fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

impl Config {
    /// Reads it from beside the model.
    pub fn load() -> Result<Self> {
        let path = cache::model("magika.json")?;
        Ok(serde_json::from_slice(&fs::read(&path).map_err(Trouble::while_doing(path.display()))?)?)
    }

    /// The first and the last bytes without white space around them, padded.
    pub fn features(&self, file: &[u8]) -> Vec<i32> {
        let block = self.block_size.min(file.len());
        let (first, last) = (&file[..block], &file[file.len() - block..]);
        let first = &first[first.iter().take_while(|byte| is_space(byte)).count()..];
        let last = &last[..last.len() - last.iter().rev().take_while(|byte| is_space(byte)).count()];
        let first = &first[..first.len().min(self.beg_size)];
        let last = &last[last.len() - last.len().min(self.end_size)..];
        let padding = |len| std::iter::repeat_n(self.padding_token, len);
        let ints = |bytes: &[u8]| bytes.iter().map(|&byte| i32::from(byte)).collect::<Vec<_>>();
        let mut features = ints(first);
        features.extend(padding(self.beg_size - first.len()));
        features.extend(padding(self.end_size - last.len()));
        features.extend(ints(last));
        features
    }

    /// The best label and its score; where the score is below the label's threshold, says so.
    pub fn verdict(&self, scores: &[f32]) -> String {
        let best = scores.iter().zip(&self.target_labels_space).max_by(|a, b| a.0.total_cmp(b.0));
        let Some((score, label)) = best else { return "nothing".to_owned() };
        let threshold = self.thresholds.get(label).copied().unwrap_or(self.medium_confidence_threshold);
        let sure = if *score >= threshold { "" } else { ", unsure" };
        let label = self.overwrite_map.get(label).unwrap_or(label);
        format!("{label} ({score:.2}{sure})")
    }
}

/// One request for each of these files.
pub fn cases(files: &[&Path]) -> Result<Vec<Case>> {
    let config = Config::load()?;
    let cases = files.iter().map(|path| {
        let bytes = fs::read(path).map_err(Trouble::while_doing(path.display()))?;
        let features = config.features(&bytes);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let shape = [1, u64::try_from(features.len())?];
        Ok(Case { label: name, inputs: vec![Tensor::i32("bytes", &shape, &features)] })
    });
    cases.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_ends_of_the_file_without_the_white_space_around_them() {
        let config = Config {
            beg_size: 4,
            end_size: 4,
            block_size: 8,
            padding_token: 256,
            medium_confidence_threshold: 0.5,
            target_labels_space: vec!["a".into(), "randomtxt".into()],
            thresholds: [("a".to_owned(), 0.9)].into(),
            overwrite_map: [("randomtxt".to_owned(), "txt".to_owned())].into(),
        };
        assert_eq!(config.features(b" \nab \n"), [97, 98, 32, 10, 32, 10, 97, 98]);
        assert_eq!(config.features(b"\t"), [256; 8]);
        assert_eq!(config.features(b"a"), [97, 256, 256, 256, 256, 256, 256, 97]);
        let long: Vec<u8> = (65..91).collect();
        assert_eq!(config.features(&long), [65, 66, 67, 68, 87, 88, 89, 90]);
        assert_eq!(config.verdict(&[0.8, 0.2]), "a (0.80, unsure)");
        assert_eq!(config.verdict(&[0.2, 0.8]), "txt (0.80)");
    }
}
