"""Contract suites for plug-ins: what an engine, objective, metric or reward from outside must do to be exchangeable."""
