package broker

import (
	"errors"

	"github.com/IBM/sarama"

	"im-gateway/codec"
)

// classify says what an error of the producer means to the client whose message it was. Only an
// error that proves that the record is not stored gets a code other than OUTCOME_UNKNOWN: a
// response may have been lost after the record was stored, and what comes back then is the error
// of the last attempt.
func classify(err error) codec.Code {
	if err == nil {
		return codec.OK
	}
	var conf sarama.ConfigurationError // on the heap, as errors.As takes its address
	switch {
	case errors.As(err, &conf), // larger than MaxRecordBytes: refused before it was sent
		errors.Is(err, sarama.ErrMessageSizeTooLarge):
		return codec.MessageTooLarge
	case errors.Is(err, sarama.ErrInvalidRecord),
		errors.Is(err, sarama.ErrTopicAuthorizationFailed),
		errors.Is(err, sarama.ErrClusterAuthorizationFailed),
		errors.Is(err, sarama.ErrUnknownTopicOrPartition),
		errors.Is(err, sarama.ErrInvalidTopic),
		errors.Is(err, sarama.ErrPolicyViolation):
		return codec.BrokerUnavailable
	}
	return codec.OutcomeUnknown
}
