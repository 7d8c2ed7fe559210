//! Infer requests of the Open Inference Protocol with binary tensors, as a client sends them.

use faaswap_protocol::DType;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Result, Trouble,
    http::{Client, Reply},
};

/// One tensor with its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<u64>,
    /// Its bytes, little-endian.
    pub data: Vec<u8>,
}

impl Tensor {
    /// A tensor of floats.
    pub fn f32(name: &str, shape: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: DType::F32, shape: shape.to_vec(), data }
    }

    /// A tensor of 32-bit integers.
    pub fn i32(name: &str, shape: &[u64], values: &[i32]) -> Self {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: DType::I32, shape: shape.to_vec(), data }
    }

    /// One 64-bit integer.
    pub fn i64_scalar(name: &str, value: i64) -> Self {
        Self { name: name.to_owned(), dtype: DType::I64, shape: Vec::new(), data: value.to_le_bytes().to_vec() }
    }

    /// The values of a tensor of floats.
    pub fn floats(&self) -> Vec<f32> {
        self.data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }
}

/// An answer to an infer request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The outputs, as they came.
    pub outputs: Vec<Tensor>,
    /// Whether the weights were on a device already.
    pub resident: bool,
    /// The broker's times in microseconds: waiting, running, and the part of running that waited for weights.
    pub queue_us: u64,
    /// See `queue_us`.
    pub run_us: u64,
    /// See `queue_us`.
    pub swap_us: u64,
}

/// What came of an infer request.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Outputs.
    Answered(Answer),
    /// A refusal, with a status code and a reason.
    Refused(u16, String),
}

#[derive(Serialize, Deserialize)]
struct Head {
    name: String,
    datatype: String,
    shape: Vec<u64>,
    parameters: Sizes,
}

#[derive(Serialize, Deserialize)]
struct Sizes {
    binary_data_size: usize,
}

#[derive(Deserialize)]
struct AnswerHead {
    outputs: Vec<Head>,
}

/// An infer request, ready to be sent any number of times.
#[derive(Clone, Debug)]
pub struct Request {
    path: String,
    headers: [(&'static str, String); 2],
    head: Vec<u8>,
    data: Vec<u8>,
}

impl Request {
    /// Asks a function for all its outputs as binary tensors.
    pub fn new(function: &str, inputs: &[Tensor]) -> Result<Self> {
        let heads = inputs.iter().map(|tensor| Head {
            name: tensor.name.clone(),
            datatype: tensor.dtype.oip().to_owned(),
            shape: tensor.shape.clone(),
            parameters: Sizes { binary_data_size: tensor.data.len() },
        });
        let body = json!({ "inputs": heads.collect::<Vec<_>>(), "parameters": { "binary_data_output": true } });
        let head = serde_json::to_vec(&body)?;
        let len = ("inference-header-content-length", head.len().to_string());
        let kind = ("content-type", "application/octet-stream".to_owned());
        let data = inputs.iter().flat_map(|tensor| tensor.data.iter().copied()).collect();
        // The only character of a function's name that means something in a path.
        let path = format!("/v2/models/{}/infer", function.replace('/', "%2F"));
        Ok(Self { path, headers: [len, kind], head, data })
    }

    /// Sends it and reads what comes.
    pub fn send(&self, client: &mut Client) -> Result<Outcome> {
        let reply = client.post(&self.path, &self.headers, &[&self.head, &self.data])?;
        match reply.status {
            200 => Ok(Outcome::Answered(read(&reply)?)),
            status => Ok(Outcome::Refused(status, reply.text())),
        }
    }
}

fn read(reply: &Reply) -> Result<Answer> {
    let head_len = match reply.header("inference-header-content-length") {
        Some(len) => len.parse()?,
        None => reply.body.len(),
    };
    let short = || Trouble::new("the answer is shorter than it says");
    let (head, mut data) = reply.body.split_at_checked(head_len).ok_or_else(short)?;
    let head: AnswerHead = serde_json::from_slice(head)?;
    let mut outputs = Vec::with_capacity(head.outputs.len());
    for output in head.outputs {
        let (mine, rest) = data.split_at_checked(output.parameters.binary_data_size).ok_or_else(short)?;
        data = rest;
        let dtype = DType::from_oip(&output.datatype);
        let dtype = dtype.ok_or_else(|| Trouble::new(format!("the answer holds a {}", output.datatype)))?;
        outputs.push(Tensor { name: output.name, dtype, shape: output.shape, data: mine.to_vec() });
    }
    if !data.is_empty() {
        return Err(Trouble::new(format!("the answer holds {} bytes too many", data.len())));
    }
    let number = |name| reply.header(name).and_then(|value| value.parse().ok());
    let untold = || Trouble::new("the answer does not tell where its time went");
    let resident = reply.header("faaswap-resident").ok_or_else(untold)? == "true";
    let [queue_us, run_us, swap_us] = ["faaswap-queue-us", "faaswap-run-us", "faaswap-swap-us"].map(number);
    let [queue_us, run_us, swap_us] =
        [queue_us.ok_or_else(untold)?, run_us.ok_or_else(untold)?, swap_us.ok_or_else(untold)?];
    Ok(Answer { outputs, resident, queue_us, run_us, swap_us })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn reply(head_len: usize, body: &[u8]) -> Reply {
        let head = [
            ("inference-header-content-length", head_len.to_string()),
            ("faaswap-resident", "false".to_owned()),
            ("faaswap-queue-us", "1".to_owned()),
            ("faaswap-run-us", "2".to_owned()),
            ("faaswap-swap-us", "3".to_owned()),
        ];
        Reply::new(200, &head, body)
    }

    #[test]
    fn an_answer_is_read_and_one_that_is_too_long_or_short_is_not() {
        let json = br#"{"outputs":[{"name":"y","datatype":"INT32","shape":[1],"parameters":{"binary_data_size":4}}]}"#;
        let body = |data: &[u8]| [&json[..], data].concat();
        let answer = read(&reply(json.len(), &body(&7_i32.to_le_bytes()))).unwrap();
        assert_eq!(answer.outputs, [Tensor::i32("y", &[1], &[7])]);
        assert_eq!((answer.resident, answer.queue_us, answer.run_us, answer.swap_us), (false, 1, 2, 3));
        assert!(read(&reply(json.len(), &body(&[0; 3]))).is_err());
        assert!(read(&reply(json.len(), &body(&[0; 5]))).is_err());
        assert!(read(&reply(json.len() + 9, &body(&[0; 4]))).is_err());
    }
}
