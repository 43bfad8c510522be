//! Flags about Consul.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use pilot::consul::{AgentOptions, Consul, ConsulOptions, Naming};

/// Flags of `flotilla control-plane` about Consul.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Consul")]
pub(crate) struct ConsulArgs {
    /// Agent of Consul whose services are services of the mesh, http://HOST:PORT or https://HOST:PORT; repeated for
    /// several registries, whose instances of one service come together
    #[arg(long = "consul", value_name = "URL")]
    agents: Vec<String>,
    /// File with the ACL token for the agents, read again before every query; over http only to loopback addresses
    #[arg(long = "consul-token-file", value_name = "FILE", requires = "agents")]
    token_file: Option<PathBuf>,
    /// Datacenter to ask the agents for; their own by default
    #[arg(long = "consul-datacenter", value_name = "DC", requires = "agents")]
    datacenter: Option<String>,
    /// Namespace of services whose metadata have no `namespace`; repeated as PREFIX=NS for services whose names begin so, of
    /// which the longest PREFIX counts
    #[arg(
        long = "consul-namespace",
        value_name = "[PREFIX=]NS",
        default_value = "default",
        requires = "agents"
    )]
    namespaces: Vec<String>,
    /// Consul's domain: services are called NAME.service.DOMAIN
    #[arg(long = "consul-domain", value_name = "NAME", default_value = "consul", requires = "agents")]
    domain: String,
    /// Roots that the certificates of https agents must chain to, PEM
    #[arg(long = "consul-ca-file", value_name = "FILE", requires = "agents")]
    ca_file: Option<PathBuf>,
    /// Certificate chain to show to https agents, PEM
    #[arg(long = "consul-cert-file", value_name = "FILE", requires_all = ["agents", "key_file"])]
    cert_file: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long = "consul-key-file", value_name = "FILE", requires_all = ["agents", "cert_file"])]
    key_file: Option<PathBuf>,
    /// Services that are watched at once at each agent; more take turns. Agents allow 200 connections by default
    /// (limits.http_max_conns_per_client)
    #[arg(long = "consul-watches", value_name = "N", default_value_t = 100, requires = "agents",
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    watches: u16,
}

impl ConsulArgs {
    fn naming(&self) -> anyhow::Result<Naming> {
        let all = self.namespaces.iter().map(|n| n.to_ascii_lowercase());
        let (prefixes, others): (Vec<_>, Vec<_>) = all.partition(|n| n.contains('='));
        anyhow::ensure!(
            others.len() <= 1,
            "--consul-namespace: {} are given without PREFIX=",
            others.join(" and ")
        );
        let split = |n: &String| n.split_once('=').map(|(p, ns)| (p.to_owned(), ns.to_owned()));
        Ok(Naming {
            namespace: others.into_iter().next().unwrap_or_else(|| "default".to_owned()),
            prefixes: prefixes.iter().filter_map(split).collect(),
            domain: self.domain.to_ascii_lowercase(),
        })
    }

    /// Starts to follow the agents, if there are any.
    pub(crate) fn start(&self, state_dir: &Path) -> anyhow::Result<Option<Arc<Consul>>> {
        if self.agents.is_empty() {
            return Ok(None);
        }
        let identity = self.cert_file.clone().zip(self.key_file.clone());
        let agent = |url: &String| AgentOptions {
            url: url.clone(),
            token_file: self.token_file.clone(),
            datacenter: self.datacenter.clone(),
            ca_file: self.ca_file.clone(),
            identity: identity.clone(),
        };
        let consul = Consul::start(ConsulOptions {
            agents: self.agents.iter().map(agent).collect(),
            naming: self.naming()?,
            watches: self.watches.into(),
            keep: Some(state_dir.to_owned()),
        })
        .context("--consul")?;
        Ok(Some(Arc::new(consul)))
    }
}
