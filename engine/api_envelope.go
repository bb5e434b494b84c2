package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// statusClientGone is what a request is counted as whose caller went away.
const statusClientGone = 499

// envelope is the shape of every answer but the documents.
type envelope struct {
	Success bool   `json:"success"`
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	Data    any    `json:"data,omitempty"`
}

func (c *call) succeed(data any) {
	body, err := json.Marshal(envelope{Success: true, Data: data})
	if err != nil {
		c.note = fmt.Errorf("encode the answer: %w", err)
		c.fail(http.StatusInternalServerError, "INTERNAL", "internal error")
		return
	}
	c.write(http.StatusOK, append(body, '\n'))
}

func (c *call) fail(status int, code, message string) {
	body, err := json.Marshal(envelope{Code: code, Message: message})
	if err != nil { // strings always encode
		c.note = err
	}
	c.write(status, append(body, '\n'))
}

func (c *call) write(status int, body []byte) {
	c.status = status
	h := c.w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	c.w.WriteHeader(status)
	if c.r.Method == http.MethodHead {
		return
	}
	if _, err := c.w.Write(body); err != nil {
		c.note = errors.Join(c.note, err)
	}
}

// retryAfter asks the caller to wait; ms 0: a second.
func (c *call) retryAfter(ms int64) {
	c.w.Header().Set("Retry-After", strconv.FormatInt(max(1, (ms+999)/1000), 10))
}

// body reads the request's body, or answers and returns false.
func (c *call) body(limit int, tooLarge string) ([]byte, bool) {
	if c.r.ContentLength > int64(limit) {
		c.w.Header().Set("Connection", "close") // rather than read it all
		c.api.tooLarge.Inc()
		c.fail(http.StatusRequestEntityTooLarge, tooLarge, bodyLimitText(limit))
		return nil, false
	}
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, int64(limit)))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		c.api.tooLarge.Inc()
		c.fail(http.StatusRequestEntityTooLarge, tooLarge, bodyLimitText(limit))
		return nil, false
	case err != nil:
		c.note = err
		c.fail(http.StatusBadRequest, "INVALID_JSON", "the body could not be read to its end")
		return nil, false
	}
	return body, true
}

func bodyLimitText(limit int) string {
	return fmt.Sprintf("the body is larger than %d bytes", limit)
}

// failStatus answers with the HTTP equivalent of an error of im-logic's.
func (c *call) failStatus(err error) {
	s := status.Convert(err)
	c.note = err
	switch s.Code() {
	case codes.Unavailable, codes.ResourceExhausted:
		c.retryAfter(retryDelay(s))
	}
	c.fail(httpStatus(s.Code()), code.Code(s.Code()).String(), publicMessage(s))
}

// publicMessage is the status' message, but where that would show our insides.
func publicMessage(s *status.Status) string {
	switch s.Code() {
	case codes.Unavailable:
		return "the service is not available; try again later"
	case codes.DeadlineExceeded:
		return "the service did not answer in time"
	case codes.Canceled:
		return "the request was given up"
	case codes.Unknown, codes.Internal, codes.DataLoss, codes.Unimplemented:
		return "internal error"
	}
	return s.Message()
}

// retryDelay is the delay in milliseconds that the status asks for; 0: none.
func retryDelay(s *status.Status) int64 {
	for _, d := range s.Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r.GetRetryDelay().AsDuration().Milliseconds()
		}
	}
	return 0
}

// httpStatus maps as grpc-gateway does.
func httpStatus(c codes.Code) int {
	switch c {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return statusClientGone
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError // Unknown, Internal, DataLoss
}
