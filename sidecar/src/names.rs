//! The control plane's name table as the resolver's.

use std::{net::IpAddr, sync::Arc};

use mesh_dns::{Host, Names, Pod, Port};
use mesh_xds::nds::{NameInfo, NamePod, NamePort, NameTable};
use tokio::{sync::watch, task::JoinHandle};

/// Who asks the resolver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// One workload whose connections are captured: it may use short names, and connects to the ports of services, which
    /// its proxy translates.
    Workload,
    /// Anybody in the cluster: full names, and ports at which pods listen.
    Cluster,
}

/// Turns the one into the other as it changes. Until the first table has come, the resolver's is unknown.
#[must_use]
pub fn follow(
    mut tables: watch::Receiver<Arc<NameTable>>,
    audience: Audience,
) -> (watch::Receiver<Arc<Names>>, JoinHandle<()>) {
    let (tx, rx) = watch::channel(Arc::new(Names::unknown()));
    let task = tokio::spawn(async move {
        let mut first = true;
        loop {
            let table = tables.borrow_and_update().clone();
            // Empty is what the channel begins with.
            if !(first && table.table.is_empty()) {
                tx.send_replace(Arc::new(names(&table, audience)));
            }
            first = false;
            if tables.changed().await.is_err() {
                return;
            }
        }
    });
    (rx, task)
}

/// The table as it answers.
#[must_use]
pub fn names(table: &NameTable, audience: Audience) -> Names {
    let cluster = audience == Audience::Cluster;
    let hosts = table.table.iter().flat_map(|(host, info)| {
        let known = Arc::new(known(info, audience));
        // Of other names a cluster has those of the mesh's zones; the rest is short for one namespace.
        let others = info.alt_hosts.iter().filter(move |h| !cluster || mesh_dns::in_mesh_zone(h));
        std::iter::once(host).chain(others).map(move |h| (h.clone(), known.clone()))
    });
    if cluster { Names::for_cluster(hosts) } else { Names::new(hosts) }
}

fn known(info: &NameInfo, audience: Audience) -> Host {
    let ports: Vec<Port> = info.ports.iter().filter_map(port).collect();
    let pod = |p: &NamePod| {
        let mut own: Vec<Port> = p.ports.iter().filter_map(port).collect();
        if audience == Audience::Workload {
            for at in &mut own {
                if let Some(of_service) = ports.iter().find(|s| s.name == at.name && s.udp == at.udp) {
                    at.number = of_service.number;
                }
            }
        }
        Pod { name: p.name.clone(), cluster: p.cluster.clone(), addresses: addresses(&p.ips), ports: own }
    };
    Host {
        addresses: addresses(&info.ips),
        headless: info.headless,
        pods: info.pods.iter().map(pod).collect(),
        ports,
    }
}

fn port(p: &NamePort) -> Option<Port> {
    Some(Port { name: p.name.clone(), number: u16::try_from(p.number).ok()?, udp: p.udp })
}

fn addresses(all: &[String]) -> Vec<IpAddr> {
    all.iter().filter_map(|ip| ip.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn table() -> NameTable {
        let port = |number| vec![NamePort { name: "sql".into(), number, udp: false }];
        let pod = NamePod {
            name: "db-0".into(),
            cluster: "west".into(),
            ips: vec!["10.0.0.1".into()],
            ports: port(15432),
        };
        let info = NameInfo {
            ips: vec!["10.0.0.1".into()],
            alt_hosts: ["db.books.svc.clusterset.local", "db.books", "db"].map(str::to_owned).to_vec(),
            ports: port(5432),
            headless: true,
            pods: vec![pod],
            ..NameInfo::default()
        };
        NameTable { table: BTreeMap::from([("db.books.svc.cluster.local".to_owned(), info)]) }
    }

    #[test]
    fn a_captured_workload_connects_to_ports_of_the_service() {
        for (audience, number) in [(Audience::Workload, 5432), (Audience::Cluster, 15432)] {
            let t = table();
            let host = known(&t.table["db.books.svc.cluster.local"], audience);
            assert_eq!(host.pods[0].ports[0].number, number, "{audience:?}");
        }
    }

    #[test]
    fn short_names_are_for_a_workload() {
        // The service, its pod in both zones and, for a workload, three short forms.
        assert_eq!(names(&table(), Audience::Cluster).len(), 4);
        assert!(names(&table(), Audience::Workload).len() > 6);
    }

    #[tokio::test]
    async fn an_empty_table_is_known_only_when_it_has_come() {
        let (tx, tables) = watch::channel(Arc::<NameTable>::default());
        let (mut names, task) = follow(tables, Audience::Cluster);
        tokio::task::yield_now().await;
        assert!(!names.borrow().is_known());
        // The mesh has nothing, and has said so.
        tx.send_replace(Arc::default());
        assert!(names.wait_for(|n| n.is_known()).await.unwrap().is_empty());
        drop(tx);
        task.await.unwrap();
    }
}
