package engine

import (
	"io"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"im-gateway/codec/gatewaypb"
)

// maxActionBody bounds the body of a request to act, in bytes.
const maxActionBody = 4 << 10

// actions adds the routes by which operators act. Each asks for the token in a header, which no page of
// another origin can make a browser send.
func (o *AdminOptions) actions(mux *http.ServeMux) {
	// A page asks whether the token that was typed in is the right one.
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		if o.mayAct(w, r) {
			w.WriteHeader(http.StatusNoContent)
		}
	})
	mux.HandleFunc("POST /drain", func(w http.ResponseWriter, r *http.Request) {
		if !o.mayAct(w, r) {
			return
		}
		if _, err := o.Operator.Drain(r.Context(), &gatewaypb.DrainRequest{}); err != nil {
			failAdmin(w, err)
			return
		}
		writeAdmin(w, http.StatusAccepted, map[string]any{"draining": true})
	})
	mux.HandleFunc("POST /kick", func(w http.ResponseWriter, r *http.Request) {
		var request gatewaypb.KickUserRequest
		if !o.mayAct(w, r) || !readAction(w, r, &request) {
			return
		}
		answer, err := o.Operator.KickUser(r.Context(), &request)
		if err != nil {
			failAdmin(w, err)
			return
		}
		writeAdmin(w, http.StatusOK, map[string]any{"closed": answer.GetClosed()})
	})
	mux.HandleFunc("POST /log-level", func(w http.ResponseWriter, r *http.Request) {
		var request gatewaypb.SetLogLevelRequest
		if !o.mayAct(w, r) || !readAction(w, r, &request) {
			return
		}
		answer, err := o.Operator.SetLogLevel(r.Context(), &request)
		if err != nil {
			failAdmin(w, err)
			return
		}
		writeAdmin(w, http.StatusOK, map[string]any{"level": answer.GetLevel()})
	})
}

// mayAct checks the token; false: it has answered.
func (o *AdminOptions) mayAct(w http.ResponseWriter, r *http.Request) bool {
	err := o.Token.check(r.RemoteAddr, r.Header.Get("Authorization"))
	if err != nil {
		failAdmin(w, err)
	}
	return err == nil
}

// readAction reads a JSON body; false: it has answered.
func readAction(w http.ResponseWriter, r *http.Request, request proto.Message) bool {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxActionBody))
	if err == nil {
		err = protojson.Unmarshal(body, request)
	}
	if err != nil {
		failAdmin(w, invalid("the body is not the JSON that is wanted: %v", err))
	}
	return err == nil
}

// failAdmin answers with an error of the Operator's or of the token's.
func failAdmin(w http.ResponseWriter, err error) {
	s := status.Convert(err)
	httpCode := httpStatus(s.Code())
	switch s.Code() {
	case codes.Unauthenticated, codes.FailedPrecondition:
		httpCode = http.StatusForbidden
	}
	writeAdmin(w, httpCode, map[string]any{"error": s.Message()})
}
