//! End-to-end tests of Flotilla: cluster drivers, scenarios, fault links, benchmarks.
